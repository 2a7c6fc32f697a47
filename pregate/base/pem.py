"""PEM files, as servers and clients read them."""

from __future__ import annotations

import base64
import codecs
import re
from pathlib import Path

from pregate.base.errors import UserError

_KEY = re.compile(rb"-----BEGIN [A-Z ]*KEY-----([A-Za-z0-9+/=\s]+)-----END ")
#: What gRPC's TLS says nothing against and then greets nobody with, by the object identifier within a key.
_UNUSABLE = {bytes.fromhex("06032b6570"): "an Ed25519", bytes.fromhex("06052b81040023"): "a P-521"}


def read_pem(option: str, path: str | Path) -> bytes:
    """Return what is in the file, without the byte order mark of an editor, which no TLS library takes.

    UserError names `option` when it cannot be read or is no PEM.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError.of(option, path, f"cannot be read: {error.strerror}") from error
    if b"-----BEGIN " not in data:
        raise UserError.of(option, path, "is not a PEM file")
    return data.removeprefix(codecs.BOM_UTF8)


def read_key(option: str, path: str | Path) -> bytes:
    """`read_pem` of a key; UserError also for a kind of key with which gRPC never makes a connection."""
    data = read_pem(option, path)
    for body in _KEY.findall(data):
        try:
            der = base64.b64decode(body)
        except ValueError as error:
            raise UserError.of(option, path, "is not a PEM file") from error
        if kind := next((kind for identifier, kind in _UNUSABLE.items() if identifier in der), None):
            raise UserError.of(option, path, f"is {kind} key, which gRPC cannot use; allowed: RSA, EC P-256 or P-384")
    return data
