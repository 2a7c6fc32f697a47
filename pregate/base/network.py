"""What an address means for safety, and whether anybody is there."""

from __future__ import annotations

import ipaddress
import socket

#: What a port may be, for errors.
PORTS = f"its port must be 1 to {(1 << 16) - 1}"


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_everywhere(host: str) -> bool:
    """Return whether `host` stands for every interface."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False


def takes_connections(host: str, port: int, timeout_s: float = 2.0) -> bool:
    """Return whether something listens there, be it busy or stopped."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout_s).close()
    except OSError:
        return False
    return True


def is_port(digits: str) -> bool:
    """Return whether something can listen there: gRPC would ask the port that is left of a larger one modulo 65536."""
    return 0 < int(digits[:6]) < 1 << 16
