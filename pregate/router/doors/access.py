"""Who may connect to a front door: bearer tokens, TLS, and the rule when they are needed."""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pregate.base import log
from pregate.base.errors import UserError
from pregate.base.network import is_loopback
from pregate.base.options import options
from pregate.base.pem import read_key, read_pem
from pregate.base.tokens import read_tokens

logger = log.get_logger(__name__)
#: A file that changed this lately may change again within the same tick of its clock.
_SETTLED_NS = 2_000_000_000


@options()
class AccessOptions:
    """`host` is the interface to listen on. TLS, and tokens or clients' certificates, are optional on loopback and
    required elsewhere; with both every client needs both.

    `token_file` holds one bearer token a line; blank lines and lines that start with `#` are skipped.
    """

    host: Annotated[str, Field(description="Interface to listen on.")] = "127.0.0.1"
    tls_cert: Annotated[Path | None, Field(description="PEM certificate chain.")] = None
    tls_key: Annotated[Path | None, Field(description="PEM key.")] = None
    tls_client_ca: Annotated[
        Path | None,
        Field(description="PEM file of who signs clients' certificates; then each client needs one."),
    ] = None
    token_file: Annotated[Path | None, Field(description="Bearer tokens, one a line.")] = None

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("--tls-cert", "--tls-key") if self.tls_cert else ("--tls-key", "--tls-cert")
            raise UserError.of(given, self.tls_cert or self.tls_key, f"needs {missing} beside it")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise UserError.of("--tls-client-ca", self.tls_client_ca, "needs --tls-cert and --tls-key beside it")
        known = self.token_file is not None or self.tls_client_ca is not None
        if not is_loopback(self.host) and (self.tls_cert is None or not known):
            needed = "needs --tls-cert, --tls-key and --token-file (or --tls-client-ca)"
            reason = f"{needed}; without them allowed: 127.0.0.1, ::1, localhost"
            if self.host.isdecimal():
                reason = "takes an address; did you mean --hosts?"
            raise UserError.of("--host", self.host, reason)

    def read_tls(self) -> tuple[bytes, bytes, bytes | None] | None:
        """Return (certificate chain, key, clients' CA or None) in PEM, or None.

        Raises UserError naming the option of a bad file.
        """
        if self.tls_cert is None or self.tls_key is None:
            return None
        ca = None if self.tls_client_ca is None else read_pem("--tls-client-ca", self.tls_client_ca)
        return read_pem("--tls-cert", self.tls_cert), read_key("--tls-key", self.tls_key), ca

    def open_tokens(self) -> TokenFile | None:
        """Return the accepted tokens, or None where none is asked for. Raises UserError for a file without any."""
        return None if self.token_file is None else TokenFile(self.token_file)


class TokenFile:
    """The bearer tokens of a file, which is looked at with every request and read again when it has changed.

    Raises UserError for a file that cannot be read or holds none. One that becomes so later leaves the tokens as they
    were, and is logged once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._stamp()
        self._tokens = read_tokens(path)
        self._failure = ""

    def accepts(self, header: str | None) -> bool:
        """Return whether an `Authorization` header carries one of the tokens the file holds now."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._read(stamp)
        return is_authorized(header, self._tokens)

    def _read(self, stamp: tuple[int, ...] | None) -> None:
        try:
            tokens, failure = read_tokens(self._path), ""
        except UserError as error:
            tokens, failure = self._tokens, str(error)
        if failure and not self._failure:
            logger.error("%s; the tokens read before stay in force", failure)
        if not failure and (self._failure or tokens != self._tokens):
            logger.info("read %d tokens from %s", len(tokens), self._path)
        self._seen, self._tokens, self._failure = stamp, tokens, failure

    def _stamp(self) -> tuple[int, ...] | None:
        """What changes with the file, None where it is not there; of one that changed a moment ago, also the time."""
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        stamp = (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)
        now_ns = time.time_ns()
        return (*stamp, now_ns) if abs(now_ns - found.st_ctime_ns) < _SETTLED_NS else stamp


def is_authorized(header: str | None, tokens: Iterable[str]) -> bool:
    """Return whether an `Authorization` header carries one of `tokens`, in a time that tells nothing about them."""
    scheme, _, given = (header or "").partition(" ")
    matches = [hmac.compare_digest(given.strip().encode(), token.encode()) for token in tokens]
    return scheme.lower() == "bearer" and any(matches)


def cache_salt(header: str | None) -> str:
    """Return a name for whoever sends this `Authorization` header that does not give their token away: what is computed
    of one's prompts is shared with nobody else, who could tell by the time what others ask."""
    return hashlib.sha256(header.encode()).hexdigest()[:32] if header else ""
