"""PEM files, as servers and clients read them."""

from __future__ import annotations

import codecs
from pathlib import Path

from pregate.base.errors import UserError


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
