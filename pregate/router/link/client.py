"""What a front door holds of an engine: requests out, events back, over asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from pregate.base import log
from pregate.base.errors import BY_CODE, DeadlineError, PregateError, ProtocolError, QueueFullError, UnavailableError
from pregate.router.link.endpoint import ipc_file
from pregate.router.link.engine_health import EngineClientOptions, EngineHealth
from pregate.router.link.merging import drain, merged
from pregate.router.link.messages import (
    ABORTED,
    CancelRequest,
    DoorBound,
    EngineBound,
    FailedEvent,
    FinishedEvent,
    Heartbeat,
    InfoReply,
    InfoRequest,
    KeepAlive,
    RouteReply,
    RouteRequest,
    SubmitRequest,
    TokensEvent,
)
from pregate.router.link.packet import MAX_PACKET_BYTES, unpack
from pregate.router.link.sender import Sender

logger = log.get_logger(__name__)
_T = TypeVar("_T")


class EngineClient:
    """One engine, seen from one event loop. The first call inside a running loop opens the channel.

    `name` is what errors call it: a path service is spoken to in the same way, and gives routes alone.

    Raises UserError for an endpoint that is neither `ipc://PATH` nor `inproc://NAME` (which needs the server's
    `context`). Every wait ends: by what is waited for, or because `_keep` found the engine silent, or its task broken.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        options: EngineClientOptions | None = None,
        context: zmq.Context | None = None,
        name: str = "the engine",
    ) -> None:
        ipc_file(endpoint)
        self._endpoint, self._name = endpoint, name
        self._options = options or EngineClientOptions()
        self._context = zmq.asyncio.Context.shadow(context or zmq.Context.instance())
        self._socket: zmq.asyncio.Socket | None = None
        self._sender: Sender | None = None
        self._monitor: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: dict[str, asyncio.Queue[DoorBound]] = {}
        self._running_ids: set[str] = set()
        self._incarnation = uuid.uuid4().hex
        self._health = EngineHealth(endpoint, name, self._options)

    @property
    def unavailable(self) -> str | None:
        """Why the engine takes no work now, or None."""
        return self._health.unavailable

    @property
    def lost(self) -> str | None:
        """Why the engine's process cannot be reached, or None. One that answers may still be `unavailable`."""
        return self._health.lost

    @property
    def num_running(self) -> int:
        """Requests that wait for the engine here."""
        return len(self._running_ids)

    def open(self) -> None:
        """Connect, so that `unavailable` becomes true to life. Must be called inside a running event loop."""
        if self._socket is not None:
            return
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_PACKET_BYTES)
        self._sender = Sender(self._socket, self._name, self._options.max_unsent_bytes)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
        self._socket.connect(self._endpoint)
        work = self._receive(), self._keep(), self._watch(self._monitor), self._sender.run()
        self._tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
        for task in self._tasks:
            task.add_done_callback(self._on_task_end)

    async def close(self) -> None:
        """Fail what is still waiting and disconnect. Repeating it is harmless."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_waiting(UnavailableError("the front door is closing"))
        if self._socket is not None and self._monitor is not None and not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=200)

    async def generate(self, request: SubmitRequest) -> AsyncGenerator[TokensEvent | FinishedEvent, None]:
        """Yield the request's events, the FinishedEvent last; tokens that piled up meanwhile come as one event.

        Leaving early (use `contextlib.aclosing`) cancels the request. Raises the error of base/errors.py whose code a
        FailedEvent carries; UnavailableError when the engine is lost, DeadlineError when the request's deadline passes
        before its end, which an engine in a long step does not see.
        """
        self._check_available()
        request_id = request.request_id
        queue: asyncio.Queue[DoorBound] = asyncio.Queue()
        self._waiting[request_id] = queue
        self._running_ids.add(request_id)
        ended, late, timer = False, None, None
        if request.deadline_s is not None:
            late = FailedEvent(request_id, DeadlineError.code, "the deadline passed before the answer was complete")
            timer = asyncio.get_running_loop().call_later(request.deadline_s, queue.put_nowait, late)
        try:
            await self._send(request)
            while not ended:
                for event in merged(await drain(queue)):
                    ended = not isinstance(event, TokensEvent) and event is not late
                    yield _checked(event, (TokensEvent, FinishedEvent))
                    if ended:  # a keep-alive of ours may have crossed the end, and the engine answered it
                        break
        finally:
            del self._waiting[request_id]
            self._running_ids.discard(request_id)
            if timer is not None:
                timer.cancel()
            if not ended:
                await self.cancel(request_id)

    async def cancel(self, request_id: str) -> None:
        """Tell the engine that nobody waits for this request any more, where it was told of it."""
        if self._sender is None or self._sender.take_out(request_id):
            return
        try:
            await self._send(CancelRequest(request_id))
        except (QueueFullError, UnavailableError) as error:
            # An engine that cannot be reached drops the request when it misses it in our keep-alives.
            logger.info("cancel of %s: %s", request_id, error)

    async def abort(self, request_id: str) -> None:
        """End a request that `generate` runs, here and in the engine: its last event says so."""
        if request_id in self._waiting:
            self._waiting[request_id].put_nowait(FinishedEvent(request_id, ABORTED, 0, 0, ()))
            await self.cancel(request_id)

    async def route(
        self, token_ids: Sequence[int], deadline_s: float | None = None, with_state: bool = False, traceparent: str = ""
    ) -> RouteReply:
        """Return the paths of a prompt, `with_state` the path router's state after it (which path services give).

        Leaving early cancels. Raises UserError when the checkpoint has no path router, DeadlineError in time.
        """
        self._check_available()
        names = uuid.uuid4().hex, log.request_id.get()
        request = RouteRequest(names[0], tuple(token_ids), deadline_s, with_state, names[1], traceparent)
        self._running_ids.add(request.request_id)
        reply = None
        try:
            reply = await self._ask(
                request, deadline_s, DeadlineError("the deadline passed before the paths were there")
            )
            return _checked(reply, RouteReply)
        finally:
            self._running_ids.discard(request.request_id)
            if reply is None:
                await self.cancel(request.request_id)

    async def info(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Return `Engine.info()` and what its link knows, also while the engine refuses requests.

        Raises UnavailableError after `timeout_s` (default: `reply_timeout_s`).
        """
        self.open()
        if self.lost is not None:
            raise UnavailableError(self.lost)
        timeout_s = self._options.reply_timeout_s if timeout_s is None else timeout_s
        late = UnavailableError(f"{self._name} gave no answer within {timeout_s:g} s")
        reply = await self._ask(InfoRequest(uuid.uuid4().hex), timeout_s, late)
        return _checked(reply, InfoReply).info

    async def _ask(self, request: RouteRequest | InfoRequest, timeout_s: float | None, late: PregateError) -> DoorBound:
        """No `asyncio.wait_for`: before Python 3.12 it loses a cancellation that comes with the answer."""
        queue: asyncio.Queue[DoorBound | None] = asyncio.Queue()
        self._waiting[request.request_id] = queue  # pyright: ignore[reportArgumentType] - None is our own
        timer = None
        if timeout_s is not None:
            timer = asyncio.get_running_loop().call_later(timeout_s, queue.put_nowait, None)
        try:
            await self._send(request)
            reply = await queue.get()
            if reply is None:
                raise late
            return reply
        finally:
            del self._waiting[request.request_id]
            if timer is not None:
                timer.cancel()
            if isinstance(request, InfoRequest) and self._sender is not None:
                self._sender.take_out(request.request_id)

    def _check_available(self) -> None:
        self.open()
        if self._health.answered and self.unavailable:
            raise UnavailableError(self.unavailable)

    async def _send(self, message: EngineBound) -> None:
        assert self._sender is not None, "open comes first"
        await self._sender.send(message)

    async def _receive(self) -> None:
        assert self._socket is not None
        while True:
            packet = await self._socket.recv()
            self._health.heard()
            try:
                messages = unpack(packet)
            except ProtocolError as error:
                logger.error("packet of the engine dropped: %s", error)
                self._fail_waiting(error)
                continue
            self._health.understood()
            for message in messages:
                self._take(message)

    def _take(self, message: Any) -> None:
        if isinstance(message, Heartbeat):
            self._health.beat(message)
        elif isinstance(message, FailedEvent) and not message.request_id:
            self._fail_waiting(ProtocolError(message.message))  # the engine could not read a packet of ours
        elif message.request_id in self._waiting:
            self._waiting[message.request_id].put_nowait(message)

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        """Note whether somebody holds the other end: the system closes it for a process that dies, not for a stopped
        one."""
        while True:
            event, _ = await monitor.recv_multipart()
            self._health.connected = int.from_bytes(event[:2], sys.byteorder) == zmq.EVENT_CONNECTED

    async def _keep(self) -> None:
        """Send keep-alives; who waits for an engine that leaves them unanswered for too long hears of it."""
        while True:
            keep_alive = KeepAlive(self._incarnation, tuple(self._running_ids))
            with contextlib.suppress(UnavailableError):
                await self._send(keep_alive)
            await asyncio.sleep(self._options.keep_alive_s)
            if self._health.tick():
                self._fail_waiting(UnavailableError(self.lost))

    def _fail_waiting(self, error: PregateError) -> None:
        for request_id, queue in self._waiting.items():
            queue.put_nowait(FailedEvent(request_id, error.code, str(error)))

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            return
        logger.error("the channel to the engine broke", exc_info=task.exception())
        for other in self._tasks:  # else the next packet would take the loss back, or nobody would see silence
            other.cancel()
        self._health.lose(f"the channel to {self._name} broke")
        self._fail_waiting(PregateError(self.lost))


def _checked(message: DoorBound, expected: type[_T] | tuple[type[_T], ...]) -> _T:
    """Return `message`; raise what a FailedEvent stands for, ProtocolError for any other kind."""
    if isinstance(message, FailedEvent):
        raise BY_CODE.get(message.code, PregateError)(message.message)
    if not isinstance(message, expected):
        raise ProtocolError(f"the engine answered with {type(message).__name__}")
    return message
