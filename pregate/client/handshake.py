"""Why a connection does not come about: what speaks at the other end is asked, for gRPC says only what it met last."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from pregate.base.errors import UserError

_PATIENCE_S = 1.0
#: What OpenSSL says of an answer that is no TLS.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE")


def trouble_with(
    target: str, ca: str | Path | None, cert: str | Path | None, key: str | Path | None
) -> UserError | None:
    """Return what the caller can mend: TLS on one side alone, a certificate that one side does not accept. None where
    it is something else. Takes up to some seconds."""
    if target.startswith("unix:") or not target.rpartition(":")[2].isdecimal():
        return None
    try:
        refusal = _greet(target, ca, cert, key)
    except ssl.SSLCertVerificationError as error:
        return UserError.of("--ca", ca, f"the certificate of {target} is not accepted: {error.verify_message}")
    except ssl.SSLError as error:
        if error.reason in _NO_TLS:
            return None if ca is None else UserError.of("--ca", ca, f"{target} speaks no TLS; leave it out")
        refusal = str(error.reason).lower().replace("_", " ")
    except OSError:
        return None
    if ca is None:
        return UserError(f"--ca: missing; {target} speaks TLS; give the PEM file of who signed its certificate")
    return _unwelcome(target, cert, refusal) if refusal else None


def _greet(target: str, ca: str | Path | None, cert: str | Path | None, key: str | Path | None) -> str:
    """Shake hands as a gRPC client does; return what went wrong afterwards, or ""."""
    host, _, port = target.rpartition(":")
    host = host.strip("[]")
    context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    if ca is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if cert is not None and key is not None:
        context.load_cert_chain(str(cert), str(key))
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port)), _PATIENCE_S) as plain:
        plain.settimeout(_PATIENCE_S)
        with context.wrap_socket(plain, server_hostname=host) as secure:
            # A server that wants to know its clients says so after its own part.
            return "" if secure.recv(1) else "it closed the connection"


def _unwelcome(target: str, cert: str | Path | None, reason: str) -> UserError:
    if cert is None:
        return UserError(f"--cert: missing; {target} seems to ask for a client's certificate ({reason})")
    return UserError.of("--cert", cert, f"is not accepted by {target} ({reason})")
