"""Sockets of the channel: where they listen, who may connect, what keys they need."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq

from pregate.base.errors import UserError
from pregate.base.log import get_logger
from pregate.base.network import is_loopback
from pregate.workers.link.protocol import MAX_MESSAGE_BYTES, Buffer

#: Unix socket paths are cut at 108 bytes by the kernel, the closing zero included; the data socket adds `.d`.
MAX_IPC_PATH_BYTES = 105
#: Messages a socket holds for a peer that does not read; what comes after is dropped.
SEND_QUEUE = 1000
#: ZeroMQ asks a peer of which it hears nothing so often whether it is there, and gives the connection up when no answer
#: comes for so long: an answer may stand behind a large message. A greeting has less time.
PING_S, PONG_S = 2.0, 10.0
_HANDSHAKE_S = 5.0
#: How long a message is looked for before the thread sleeps; a layer takes about as long.
_SPIN_S = 0.002

_log = get_logger(__name__)


@dataclass(frozen=True)
class CurveKeys:
    """A CURVE key pair (Z85, 40 characters each)."""

    public: str
    secret: str

    @staticmethod
    def new() -> CurveKeys:
        public, secret = zmq.curve_keypair()
        return CurveKeys(public.decode(), secret.decode())


class AllowedKeys:
    """Says to the authenticator which client keys may connect."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = frozenset(keys)

    def callback(self, domain: str, key: bytes) -> bool:
        return key.decode() in self._keys


def open_socket(context: zmq.Context, kind: int, ping_s: float = PING_S, pong_s: float = PONG_S) -> zmq.Socket:
    """Return a socket with the bounds both sides share.

    It notices a connection on which nothing comes through within `ping_s` + `pong_s`; so does a peer without heartbeats
    of its own, within `PING_S` + `PONG_S` whatever is given here.
    """
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 100)
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
    socket.setsockopt(zmq.RCVHWM, SEND_QUEUE)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, max(1, int(ping_s * 1000)))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, max(1, int(pong_s * 1000)))
    socket.setsockopt(zmq.HEARTBEAT_TTL, int((PING_S + PONG_S) * 1000))
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(_HANDSHAKE_S * 1000))
    return socket


def control_id(client: bytes) -> bytes:
    """Routing id of a client's control socket. (An id must not start with a zero byte, which a uuid may.)"""
    return b"c" + client


def data_id(client: bytes) -> bytes:
    """Routing id of a client's data socket."""
    return b"d" + client


def client_of(routing_id: bytes) -> bytes:
    """Return the client behind either of its sockets."""
    return routing_id[1:]


def receive(socket: zmq.Socket, look_first: bool = True) -> list[zmq.Frame]:
    """Take a message within the socket's timeout, else zmq.Again. With `look_first` it is looked for without sleep for
    `_SPIN_S`: to be woken takes longer than most answers (0.1 to 0.3 ms on a virtual machine)."""
    until_s = time.perf_counter() + _SPIN_S
    while look_first and time.perf_counter() < until_s:
        with contextlib.suppress(zmq.Again):
            return socket.recv_multipart(zmq.NOBLOCK, copy=False)
        os.sched_yield()
    return socket.recv_multipart(copy=False)


def send(socket: zmq.Socket, peer: bytes, frames: Sequence[Buffer]) -> bool:
    """Send to one peer of a ROUTER socket without waiting; False if the peer is gone.

    A peer that does not read loses what does not fit its queue: its own timeouts tell it so.
    """
    try:
        # Copied: pyzmq's zero-copy sends need a Python thread to release each buffer.
        socket.send_multipart([peer, *frames], zmq.NOBLOCK)
    except zmq.Again:
        _log.warning("an engine does not read; a message to it is dropped")
    except zmq.ZMQError as error:
        if error.errno != zmq.EHOSTUNREACH:
            raise
        return False
    return True


def data_endpoint(endpoint: str) -> str:
    """Where the data socket of a host at `endpoint` is to listen."""
    return f"{endpoint}.d" if endpoint.startswith("ipc://") else f"{endpoint.rpartition(':')[0]}:*"


def check_endpoint(endpoint: str, allowed_client_keys: Sequence[str]) -> None:
    """Raise UserError for an endpoint a host must not listen on."""
    scheme, _, where = endpoint.partition("://")
    if scheme == "ipc":
        if len(os.fsencode(where)) > MAX_IPC_PATH_BYTES:
            raise UserError.of("endpoint", endpoint, f"its path must be at most {MAX_IPC_PATH_BYTES} bytes")
        return
    if scheme != "tcp":
        raise UserError.of("endpoint", endpoint, "allowed: ipc://PATH or tcp://ADDRESS:PORT")
    if not allowed_client_keys and not is_loopback(where.rpartition(":")[0]):
        raise UserError.of("endpoint", endpoint, "needs allowed client keys; without them only loopback is allowed")


def private_folder(path: Path) -> None:
    """Make the folder of an ipc socket, for its owner only; UserError if it exists and others may enter it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise UserError.of("ipc folder", path, f"mode {stat.S_IMODE(found.st_mode):o}; it must be yours, with mode 700")
