"""Addresses of the channel between front doors and engines."""

from __future__ import annotations

import os
from pathlib import Path

import zmq

from pregate.base.errors import UserError
from pregate.router.link.packet import MAX_PACKET_BYTES

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


def starting_file(endpoint: str) -> Path | None:
    """The file that is there while who serves an `ipc://` endpoint starts."""
    file = ipc_file(endpoint)
    return None if file is None else file.with_name(file.name + ".starting")


def bind(context: zmq.Context, endpoint: str, max_unsent_packets: int) -> zmq.Socket:
    """The engine's socket, bound; only this user may open its file. UserError for an endpoint that cannot be bound."""
    file = ipc_file(endpoint)
    if file is not None:
        # Whoever can open the socket file can submit requests.
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if file.parent.stat().st_uid != os.getuid():
            raise UserError.of("engine endpoint", endpoint, "its folder is another user's")
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a door that is gone fails instead of vanishing
    socket.setsockopt(zmq.SNDHWM, max_unsent_packets)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_PACKET_BYTES)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise UserError.of("engine endpoint", endpoint, f"cannot be bound: {error}") from error
    if file is not None:
        file.chmod(0o600)
    return socket
