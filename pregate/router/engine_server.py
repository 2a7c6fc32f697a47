"""The engine's side of the channel to front doors: one thread that receives, steps the engine and sends events."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event as StopEvent
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import zmq

from pregate.base.errors import PregateError, ProtocolError, UnavailableError, UserError
from pregate.base.log import get_logger
from pregate.router.endpoint import ipc_file
from pregate.router.messages import (
    CancelRequest,
    DoorBound,
    Event,
    FailedEvent,
    InfoReply,
    InfoRequest,
    KeepAlive,
    Message,
    RouteReply,
    RouteRequest,
    SubmitRequest,
    TokensEvent,
)
from pregate.router.packet import MAX_PACKET_BYTES, pack, unpack

if TYPE_CHECKING:
    from pregate.model.paths import Paths

logger = get_logger(__name__)


class Engine(Protocol):
    """What the server needs of router/engine.py. Only the server's thread calls it."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: SubmitRequest) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def route(self, token_ids: Sequence[int]) -> Paths: ...
    def info(self) -> dict[str, Any]: ...
    def step(self) -> Sequence[Event]: ...
    def idle(self) -> None: ...
    def fail_all(self, error: PregateError) -> object: ...


@dataclass(frozen=True)
class EngineServerOptions:
    """Times of the loop, in seconds, and how many unsent packets a slow door may pile up."""

    keep_alive_s: float = 1.0
    peer_silence_s: float = 10.0
    idle_poll_s: float = 0.1
    max_unsent_packets: int = 100_000


@dataclass
class _Peer:
    last_heard_s: float
    request_ids: set[str] = field(default_factory=set)


class EngineServer:
    """Serves one engine on `endpoint` (`ipc://PATH`, or `inproc://NAME` with a shared `context`).

    The endpoint is bound by the constructor, so doors may connect before `run` starts. Raises UserError for an
    endpoint that cannot be bound.
    """

    def __init__(
        self,
        engine: Engine,
        endpoint: str,
        *,
        options: EngineServerOptions | None = None,
        context: zmq.Context | None = None,
    ) -> None:
        self._engine = engine
        self._options = options or EngineServerOptions()
        self._incarnation = uuid.uuid4().hex
        self._peers: dict[bytes, _Peer] = {}
        self._owners: dict[str, bytes] = {}
        self._lost: UnavailableError | None = None
        self._next_keep_alive_s = 0.0
        self._ipc_file = ipc_file(endpoint)
        self._socket = _bind(context or zmq.Context.instance(), endpoint, self._ipc_file, self._options)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def run(self, stop_event: StopEvent) -> None:
        """Serve until `stop_event` is set; then every request still running fails with UNAVAILABLE."""
        try:
            while not stop_event.is_set():
                self._turn()
            self._fail_requests(UnavailableError("the engine is stopping"))
        except Exception:
            # A bug: the loop ends with it, but callers are told now rather than by silence.
            self._fail_requests(PregateError("internal error in the engine"))
            raise
        finally:
            self._socket.close(linger=500)
            if self._ipc_file is not None:
                self._ipc_file.unlink(missing_ok=True)

    def _turn(self) -> None:
        busy = self._lost is None and self._engine.has_work
        if self._poller.poll(0 if busy else int(self._options.idle_poll_s * 1000)):
            self._receive_all()
        # After receiving and before a step, which may be long: a door is silent only if nothing of it is waiting here.
        self._tend_peers(time.monotonic())
        if self._lost is None:
            self._advance()

    def _advance(self) -> None:
        try:
            if self._engine.has_work:
                self._deliver(self._engine.step())
            else:
                self._engine.idle()
        except PregateError as error:
            # A lost host, or one that failed or refused a group: nothing can be computed any more.
            logger.error("%s; requests are refused from now on", error)
            self._lost = error if isinstance(error, UnavailableError) else UnavailableError(str(error))
            self._fail_requests(self._lost)
            self._next_keep_alive_s = 0.0  # tell the doors at once

    # --- receiving ---

    def _receive_all(self) -> None:
        while True:
            try:
                peer_id, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            peer = self._peers.setdefault(peer_id, _Peer(0.0))
            peer.last_heard_s = time.monotonic()
            try:
                messages = [message for frame in frames for message in unpack(frame)]
            except ProtocolError as error:
                logger.warning("packet of a front door dropped: %s", error)
                self._send(peer_id, [FailedEvent("", error.code, str(error))])
                continue
            for message in messages:
                self._handle(peer_id, message)

    def _handle(self, peer_id: bytes, message: Message) -> None:
        try:
            if isinstance(message, SubmitRequest):
                self._submit(peer_id, message)
            elif isinstance(message, CancelRequest):
                self._cancel(peer_id, message.request_id)
            elif isinstance(message, RouteRequest):
                self._send(peer_id, [self._route(message)])
            elif isinstance(message, InfoRequest):
                self._send(peer_id, [InfoReply(message.request_id, self._engine.info())])
            elif isinstance(message, KeepAlive):
                self._reconcile(peer_id, message.request_ids)
        except PregateError as error:
            request_id = getattr(message, "request_id", "")
            self._send(peer_id, [FailedEvent(request_id, error.code, str(error))])

    def _submit(self, peer_id: bytes, request: SubmitRequest) -> None:
        if self._lost is not None:
            raise UnavailableError(str(self._lost))
        if request.request_id in self._owners:
            raise UserError.of("request_id", request.request_id, "is already running")
        self._engine.submit(request)
        self._owners[request.request_id] = peer_id
        self._peers[peer_id].request_ids.add(request.request_id)

    def _cancel(self, peer_id: bytes, request_id: str) -> None:
        if self._owners.get(request_id) == peer_id:
            self._forget(request_id)
            self._engine.cancel(request_id)

    def _reconcile(self, peer_id: bytes, request_ids: Sequence[str]) -> None:
        unknown = [i for i in request_ids if self._owners.get(i) != peer_id]
        for request_id in self._peers[peer_id].request_ids.difference(request_ids):
            self._cancel(peer_id, request_id)
        if unknown:
            reason = "the engine does not know this request; it was restarted or had lost the front door"
            self._send(peer_id, [FailedEvent(i, UnavailableError.code, reason) for i in unknown])

    def _route(self, request: RouteRequest) -> RouteReply:
        paths = self._engine.route(request.token_ids)
        num_tokens, num_layers, num_active = paths.ids.shape
        ids = np.ascontiguousarray(paths.ids, dtype="<i2").tobytes()
        version = str(self._engine.info()["version"])
        return RouteReply(request.request_id, ids, (num_tokens, num_layers, num_active), bool(paths.exact), version)

    # --- sending ---

    def _deliver(self, events: Sequence[Event]) -> None:
        """Send each event to the door that owns its request, one packet per door; drop those nobody waits for."""
        packets: dict[bytes, list[DoorBound]] = defaultdict(list)
        for event in events:
            peer_id = self._owners.get(event.request_id)
            if peer_id is None:
                continue
            packets[peer_id].append(event)
            if not isinstance(event, TokensEvent):
                self._forget(event.request_id)
        for peer_id, messages in packets.items():
            self._send(peer_id, messages)

    def _send(self, peer_id: bytes, messages: Sequence[DoorBound]) -> None:
        try:
            self._socket.send_multipart([peer_id, pack(messages)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self._drop_peer(peer_id, "its connection is gone or it does not read")

    def _fail_requests(self, error: PregateError) -> None:
        self._deliver([FailedEvent(request_id, error.code, str(error)) for request_id in list(self._owners)])
        self._engine.fail_all(error)

    # --- peers ---

    def _tend_peers(self, now_s: float) -> None:
        if now_s < self._next_keep_alive_s:
            return
        self._next_keep_alive_s = now_s + self._options.keep_alive_s
        keep_alive = KeepAlive(self._incarnation, None if self._lost is None else str(self._lost))
        for peer_id, peer in list(self._peers.items()):
            silence_s = now_s - peer.last_heard_s
            if silence_s > self._options.peer_silence_s:
                self._drop_peer(peer_id, f"silent for {silence_s:.1f} s")
            else:
                self._send(peer_id, [keep_alive])

    def _drop_peer(self, peer_id: bytes, reason: str) -> None:
        peer = self._peers.pop(peer_id, None)
        if peer is None:
            return
        logger.info("front door %s: %s; %d requests cancelled", peer_id.hex(), reason, len(peer.request_ids))
        for request_id in peer.request_ids:
            self._owners.pop(request_id, None)
            self._engine.cancel(request_id)

    def _forget(self, request_id: str) -> None:
        peer = self._peers.get(self._owners.pop(request_id, b""))
        if peer is not None:
            peer.request_ids.discard(request_id)


def _bind(context: zmq.Context, endpoint: str, file: Path | None, options: EngineServerOptions) -> zmq.Socket:
    if file is not None:
        # Whoever can open the socket file can submit requests: only this user may.
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a door that is gone fails instead of vanishing
    socket.setsockopt(zmq.SNDHWM, options.max_unsent_packets)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_PACKET_BYTES)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise UserError.of("engine endpoint", endpoint, f"cannot be bound: {error}") from error
    if file is not None:
        file.chmod(0o600)
    return socket
