"""Who may connect to a front door: bearer tokens, TLS, and the rule when they are needed."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pregate.base.errors import UserError
from pregate.base.network import is_loopback
from pregate.base.options import options
from pregate.base.tokens import read_tokens


@options()
class AccessOptions:
    """`host` is the interface to listen on. TLS and tokens are optional on loopback and required elsewhere.

    `token_file` holds one bearer token a line; blank lines and lines that start with `#` are skipped.
    """

    host: Annotated[str, Field(description="Interface to listen on.")] = "127.0.0.1"
    tls_cert: Annotated[Path | None, Field(description="PEM certificate chain.")] = None
    tls_key: Annotated[Path | None, Field(description="PEM key.")] = None
    token_file: Annotated[Path | None, Field(description="Bearer tokens, one a line.")] = None

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("--tls-cert", "--tls-key") if self.tls_cert else ("--tls-key", "--tls-cert")
            raise UserError.of(given, self.tls_cert or self.tls_key, f"needs {missing} beside it")
        if not is_loopback(self.host) and (self.tls_cert is None or self.token_file is None):
            allowed = "needs --tls-cert, --tls-key and --token-file; without them allowed: 127.0.0.1, ::1, localhost"
            raise UserError.of("--host", self.host, allowed)

    def read_tls(self) -> tuple[bytes, bytes] | None:
        """Return (certificate chain, key) in PEM, or None. Raises UserError naming the option of a bad file."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return _read_pem("--tls-cert", self.tls_cert), _read_pem("--tls-key", self.tls_key)

    def read_tokens(self) -> frozenset[str]:
        """Return the accepted tokens; empty means that none is asked for. Raises UserError for a file without any."""
        return frozenset() if self.token_file is None else frozenset(read_tokens(self.token_file))


def is_authorized(header: str | None, tokens: Iterable[str]) -> bool:
    """Return whether an `Authorization` header carries one of `tokens`, in a time that tells nothing about them."""
    scheme, _, given = (header or "").partition(" ")
    matches = [hmac.compare_digest(given.strip().encode(), token.encode()) for token in tokens]
    return scheme.lower() == "bearer" and any(matches)


def cache_salt(header: str | None) -> str:
    """Return a name for whoever sends this `Authorization` header that does not give their token away: what is computed
    of one's prompts is shared with nobody else, who could tell by the time what others ask."""
    return hashlib.sha256(header.encode()).hexdigest()[:32] if header else ""


def _read_pem(option: str, path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError.of(option, path, f"cannot be read: {error.strerror}") from error
    if b"-----BEGIN " not in data:
        raise UserError.of(option, path, "is not a PEM file")
    return data
