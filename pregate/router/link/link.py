"""The engine's side of the channel to front doors: an I/O thread that answers them while a step runs.

It sleeps in poll. Two queues join it to the compute thread: the inbox of requests, and the outbox of events, which
wakes the poll. Both are bounded.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import zmq

from pregate.base.errors import PregateError, ProtocolError, UnavailableError, UserError, logged
from pregate.base.log import get_logger
from pregate.base.telemetry import span
from pregate.router.link.activity import Activity
from pregate.router.link.endpoint import bind, ipc_file
from pregate.router.link.inbox import Inbox, Pending
from pregate.router.link.messages import (
    CancelRequest,
    DoorBound,
    Event,
    FailedEvent,
    FinishedEvent,
    Heartbeat,
    InfoReply,
    InfoRequest,
    KeepAlive,
    Message,
    RouteReply,
    RouteRequest,
    SubmitRequest,
    TokensEvent,
)
from pregate.router.link.outbox import Outbox
from pregate.router.link.packet import pack, unpack
from pregate.router.link.peers import Peers

logger = get_logger(__name__)
#: Packets taken in before events go out again.
_PACKETS_PER_TURN = 256
#: How long the compute thread waits for the I/O thread to end.
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class LinkOptions:
    """Times in seconds; bounds of what waits for the compute thread, of steps whose events wait for the I/O thread,
    and of the packets that a slow door may pile up."""

    heartbeat_s: float = 0.5
    peer_silence_s: float = 10.0
    max_pending_requests: int = 1024
    max_pending_bytes: int = 64 << 20
    max_unsent_steps: int = 1024
    max_unsent_packets: int = 100_000


class EngineLink:
    """Owns the socket at `endpoint`, bound by the constructor; `start` begins to answer.

    `info` is called from the I/O thread and, where metrics are exported, from theirs; `name` is what answers call who
    serves. Raises UserError for an endpoint that cannot be bound.
    """

    def __init__(
        self,
        endpoint: str,
        info: Callable[[], Mapping[str, Any]],
        options: LinkOptions,
        context: zmq.Context | None,
        name: str = "engine",
    ) -> None:
        self.inbox = Inbox(options.max_pending_requests, options.max_pending_bytes, name)
        self.activity = Activity()
        self.refusing: str | None = None
        self.broken = False
        self._info, self._options, self._name = info, options, name
        self._incarnation = uuid.uuid4().hex
        self._peers = Peers()
        self._outbox = Outbox(options.max_unsent_steps)
        self._to_fail: PregateError | None = None
        self._ending: PregateError | None = None
        self._next_heartbeat_s = self._watched_s = 0.0
        self._ipc_file = ipc_file(endpoint)
        self._socket = bind(context or zmq.Context.instance(), endpoint, options.max_unsent_packets)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._outbox.awake, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="engine-link", daemon=True)

    # --- what the compute thread calls ---

    def start(self) -> None:
        self._thread.start()

    def publish(self, events: Sequence[Event | RouteReply]) -> None:
        """Send each event to the door that waits for its request. Raises PregateError when the I/O thread is stuck."""
        if self.broken:
            raise PregateError("the link to the front doors broke; the log says why")
        if events:
            self._outbox.put(events)

    def fail_requests(self, error: PregateError) -> None:
        """End every request that anybody waits for; what is in the inbox leaves it."""
        self._to_fail = error
        self._outbox.wake_up()

    def refuse(self, reason: str | None) -> None:
        """Refuse requests from now on and tell all doors why; None takes them again."""
        self.refusing = reason
        self._next_heartbeat_s = 0.0
        self._outbox.wake_up()

    def stop(self, error: PregateError) -> None:
        """End every request with `error`, close the socket, remove its file."""
        self._ending = error
        self._outbox.wake_up()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE_S)
        self._outbox.close()

    # --- the I/O thread ---

    def _run(self) -> None:
        try:
            while self._ending is None:
                self._turn()
            self._send_events()
            self.refusing = str(self._ending)
            self._fail_all(self._ending)
            self._send_heartbeats()
        except Exception:
            logger.exception("the link to the front doors broke")
            self.broken = True
        finally:
            self._socket.close(linger=500)
            self._outbox.leave()
            if self._ipc_file is not None:
                self._ipc_file.unlink(missing_ok=True)

    def _turn(self) -> None:
        sleep_s = max(0.0, self._next_heartbeat_s - time.monotonic())
        if (self._outbox.awake, zmq.POLLIN) in self._poller.poll(math.ceil(sleep_s * 1000)):
            self._outbox.rest()
        self._receive()
        self._send_events()
        if self._to_fail is not None:
            error, self._to_fail = self._to_fail, None
            self._fail_all(error)
        now_s = time.monotonic()
        if now_s >= self._next_heartbeat_s:
            self._next_heartbeat_s = now_s + self._options.heartbeat_s
            # Time in which this process was stopped does not count: doors spoke, and nobody heard them.
            self._watched_s += self._options.heartbeat_s
            for peer_id in self._peers.silent(self._watched_s - self._options.peer_silence_s):
                self._drop_peer(peer_id, "silent")
            self._send_heartbeats()

    # --- receiving ---

    def _receive(self) -> None:
        for _ in range(_PACKETS_PER_TURN):
            try:
                peer_id, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._peers.heard(peer_id, self._watched_s)
            try:
                messages = [message for frame in frames for message in unpack(frame)]
            except ProtocolError as error:
                logger.warning("packet of a front door dropped: %s", error)
                self._send(peer_id, [FailedEvent("", error.code, str(error))])
                continue
            for message in messages:
                self._handle(peer_id, message)

    def _handle(self, peer_id: bytes, message: Message) -> None:
        if peer_id not in self._peers:
            return  # an answer to this packet could not be sent: the door has gone
        request_id = getattr(message, "request_id", "")
        try:
            if isinstance(message, (SubmitRequest, RouteRequest)):
                self._accept(peer_id, message)
            elif isinstance(message, CancelRequest):
                if self._peers.owner(request_id) == peer_id:
                    self._give_up(request_id, "cancelled")
            elif isinstance(message, InfoRequest):
                self._send(peer_id, [InfoReply(request_id, self.describe())])
            elif isinstance(message, KeepAlive):
                self._reconcile(peer_id, message.request_ids)
        except PregateError as error:
            self._log("refused", getattr(message, "called", ""), logged(error.code, str(error)))
            self._send(peer_id, [FailedEvent(request_id, error.code, str(error))])
        except Exception:
            # Whatever a message holds, it costs itself alone: the other doors' requests go on.
            logger.exception("a message of a front door was dropped by a bug")
            self._send(peer_id, [FailedEvent(request_id, PregateError.code, f"internal error in the {self._name}")])

    def _accept(self, peer_id: bytes, request: SubmitRequest | RouteRequest) -> None:
        if self.refusing is not None and isinstance(request, SubmitRequest):
            raise UnavailableError(self.refusing)
        if (owner := self._peers.owner(request.request_id)) == peer_id:
            return  # it came twice, and runs
        if owner is not None:
            raise UserError.of("request_id", request.request_id, "is running already; use a new one")
        name = "engine" if isinstance(request, SubmitRequest) else "paths"
        begun = span(name, request.traceparent, prompt_tokens=len(request.token_ids))
        request = replace(request, traceparent=begun.traceparent)
        try:
            self.inbox.put(Pending(request, time.monotonic()))
        except PregateError as error:
            begun.end(f"{error.code}: {error}")
            raise
        self._peers.add(peer_id, request.request_id, request.called, begun)
        self._log("taken", request.called, f"{len(request.token_ids)} tokens")

    def _give_up(self, request_id: str, why: str) -> None:
        self._end(request_id, why)
        self.inbox.cancel(request_id)

    def _end(self, request_id: str, how: str, failed: bool = False) -> None:
        """Nobody waits for it any more."""
        called, begun = self._peers.told(request_id)
        self._log("ended", called, how)
        begun.end(how if failed else "", ended=how)
        self._peers.remove(request_id)

    def _trace_parts(self, end: FinishedEvent) -> None:
        """Say of a text that ends now how long it waited, was read, and was written."""
        parent, at_s = self._peers.told(end.request_id)[1].traceparent, time.time()
        at_s -= end.queue_s + end.prefill_s + end.decode_s
        for name, took_s in (("queue", end.queue_s), ("prefill", end.prefill_s), ("decode", end.decode_s)):
            part, at_s = span(name, parent, at_s=at_s), at_s + took_s
            part.end(at_s=at_s)

    def _log(self, what: str, called: str, more: str) -> None:
        if called:  # what a door asks for itself has no name
            logger.info("%s: %s", what, more, extra={"request_id": called})

    def describe(self) -> dict[str, Any]:
        """Return the engine's info, what waits for it, what it is busy with, and why it takes no work (or None)."""
        info = dict(self._info())
        info["num_queued"] = info.get("num_queued", 0) + len(self.inbox)
        return {**info, **self.activity.describe(), "unavailable": self.refusing}

    def _reconcile(self, peer_id: bytes, request_ids: Sequence[str]) -> None:
        unknown, unwanted = self._peers.compare(peer_id, request_ids)
        for request_id in unwanted:
            self._give_up(request_id, "its front door does not wait for it")
        if unknown:
            reason = f"the {self._name} does not know this request; it was restarted or had lost the front door"
            self._send(peer_id, [FailedEvent(i, UnavailableError.code, reason) for i in unknown])

    # --- sending ---

    def _send_events(self) -> None:
        """Send what the compute thread has published, one packet per step and door; drop what nobody waits for."""
        for events in self._outbox.take():
            self._deliver(events)

    def _deliver(self, events: Sequence[Event | RouteReply]) -> None:
        packets: dict[bytes, list[DoorBound]] = defaultdict(list)
        for event in events:
            peer_id = self._peers.owner(event.request_id)
            if peer_id is None:
                continue
            packets[peer_id].append(event)
            if not isinstance(event, TokensEvent):
                if isinstance(event, FinishedEvent):
                    self._trace_parts(event)
                self._end(event.request_id, _told(event), isinstance(event, FailedEvent))
        for peer_id, messages in packets.items():
            self._send(peer_id, messages)

    def _send(self, peer_id: bytes, messages: Sequence[DoorBound]) -> None:
        try:
            packet = pack(messages)
        except ProtocolError as error:
            logger.error("answer to a front door dropped: %s", error)
            packet = pack([FailedEvent(i, error.code, str(error)) for i in _short_ids(messages)])
        try:
            self._socket.send_multipart([peer_id, packet], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self._drop_peer(peer_id, "its connection is gone or it does not read")

    def _send_heartbeats(self) -> None:
        beat = Heartbeat(self._incarnation, **self.activity.describe(), unavailable=self.refusing)
        for peer_id in self._peers:
            self._send(peer_id, [beat])

    def _fail_all(self, error: PregateError) -> None:
        request_ids = self._peers.requests
        for request_id in request_ids:
            self.inbox.cancel(request_id)
        self._deliver([FailedEvent(request_id, error.code, str(error)) for request_id in request_ids])

    def _drop_peer(self, peer_id: bytes, reason: str) -> None:
        request_ids = self._peers.drop(peer_id)
        logger.info("front door %s: %s; %d requests cancelled", peer_id.hex(), reason, len(request_ids))
        for request_id in request_ids:
            self._give_up(request_id, "its front door is gone")


def _told(end: FinishedEvent | FailedEvent | RouteReply) -> str:
    if isinstance(end, FailedEvent):
        return logged(end.code, end.message)
    return "paths" if isinstance(end, RouteReply) else f"{end.reason} after {end.completion_tokens} tokens"


def _short_ids(messages: Sequence[DoorBound]) -> list[str]:
    return [i for m in messages if 0 < len(i := getattr(m, "request_id", "")) <= 128]
