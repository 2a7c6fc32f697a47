"""What an address means for safety."""

from __future__ import annotations

import ipaddress

#: What a port may be, for errors.
PORTS = f"its port must be 1 to {(1 << 16) - 1}"


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_port(digits: str) -> bool:
    """Return whether something can listen there: gRPC would ask the port that is left of a larger one modulo 65536."""
    return 0 < int(digits[:6]) < 1 << 16
