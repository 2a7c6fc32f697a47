"""`Sender`: what a front door says to an engine, in order, whether the engine reads just now or not."""

from __future__ import annotations

import asyncio

import zmq
import zmq.asyncio

from pregate.base.errors import QueueFullError, UnavailableError
from pregate.router.link.messages import CancelRequest, EngineBound, KeepAlive
from pregate.router.link.packet import pack

#: Packets in the socket, which nobody can take out again.
_SOCKET_PACKETS = 16


class Sender:
    """What the socket does not take waits here, and who gives up takes it out again: a socket's own queue is bounded in
    packets, of which every request that is given up would leave two, and after a while none would be taken.

    Bounded in bytes; one is taken in any case, and always a keep-alive, of which the last alone is kept.
    """

    def __init__(self, socket: zmq.asyncio.Socket, name: str, max_bytes: int) -> None:
        socket.setsockopt(zmq.SNDHWM, _SOCKET_PACKETS)
        self._socket, self._name, self._max_bytes = socket, name, max_bytes
        self._waiting: dict[tuple[bool, str], bytes] = {}  # oldest first; by whether it is a cancel, and request id
        self._num_bytes, self._blocked, self._some = 0, False, asyncio.Event()

    async def send(self, message: EngineBound) -> None:
        """Send it, now or later; never suspends. QueueFullError where too many bytes wait, UnavailableError where the
        socket is closed."""
        if self._socket.closed:
            raise UnavailableError("the front door is closing")
        packet = pack([message])
        if not self._waiting and not self._blocked:
            try:
                await self._socket.send(packet, zmq.NOBLOCK)
                return
            except zmq.Again:
                pass
        if not isinstance(message, KeepAlive) and 0 < self._num_bytes > self._max_bytes - len(packet):
            held = f"{self._num_bytes} bytes wait to be sent, at most {self._max_bytes} may"
            raise QueueFullError(f"{self._name} reads no messages: {held}; try again later")
        self._put((isinstance(message, CancelRequest), getattr(message, "request_id", "")), packet)

    def take_out(self, request_id: str) -> bool:
        """Whether a request was still here: it is not sent any more."""
        packet = self._waiting.pop((False, request_id), b"")
        self._num_bytes -= len(packet)
        return bool(packet)

    async def run(self) -> None:
        """Send what waits as soon as the socket takes it, for ever."""
        while True:
            await self._some.wait()
            while self._waiting:
                key = next(iter(self._waiting))
                packet = self._waiting.pop(key)
                self._num_bytes -= len(packet)
                self._blocked = True
                await self._socket.send(packet)
                self._blocked = False
            self._some.clear()

    def _put(self, key: tuple[bool, str], packet: bytes) -> None:
        self._num_bytes += len(packet) - len(self._waiting.pop(key, b""))  # an older keep-alive, which says less
        self._waiting[key] = packet
        self._some.set()
