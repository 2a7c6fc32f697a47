"""Addresses of the channel between front doors and engines."""

from __future__ import annotations

import os
from pathlib import Path

from pregate.base.errors import UserError

#: Longest path of a Unix socket that Linux and macOS both take.
_MAX_IPC_PATH_BYTES = 103


def ipc_file(endpoint: str) -> Path | None:
    """Return the socket file of an `ipc://` endpoint, None for `inproc://`. Raises UserError for any other."""
    scheme, _, address = endpoint.partition("://")
    if scheme not in ("ipc", "inproc") or not address:
        raise UserError.of("engine endpoint", endpoint, "must be ipc://PATH or inproc://NAME")
    if scheme == "inproc":
        return None
    if len(os.fsencode(address)) > _MAX_IPC_PATH_BYTES:
        raise UserError.of("engine endpoint", endpoint, f"the path may have at most {_MAX_IPC_PATH_BYTES} bytes")
    return Path(address)
