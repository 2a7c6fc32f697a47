"""Serves one engine: the compute thread, which takes requests, steps and publishes, beside the link's I/O thread."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from threading import Event as StopEvent
from typing import TYPE_CHECKING, Any, Protocol

import zmq

from pregate.base.errors import HostLostError, PregateError, QueueFullError, UnavailableError
from pregate.base.log import get_logger
from pregate.model.packed_paths import PackedPaths
from pregate.router.link.inbox import Pending
from pregate.router.link.link import EngineLink, LinkOptions
from pregate.router.link.messages import Event, FailedEvent, FinishedEvent, RouteReply, RouteRequest, SubmitRequest

if TYPE_CHECKING:
    from pregate.model.paths import Paths

logger = get_logger(__name__)
#: How long a compute thread with nothing to do waits for a request before it looks whether it is to stop.
IDLE_POLL_S = 0.1


class ServedEngine(Protocol):
    """What the server needs of an engine. Only the compute thread calls it, but for `info`, which only reads.

    `step` and `idle` raise HostLostError while no expert host answers; a step can be tried again then. Any other
    failure of a step is an event of each request that was in it.
    """

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: SubmitRequest) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def route(self, token_ids: Sequence[int]) -> Paths: ...
    def info(self) -> dict[str, Any]: ...
    def step(self) -> Sequence[Event]: ...
    def idle(self) -> None: ...
    def expire(self, error: PregateError | None = None) -> Sequence[Event]: ...
    def fail_all(self, error: PregateError) -> object: ...


@dataclass(frozen=True)
class EngineServerOptions:
    """`prompt_tokens_per_turn` bounds the prompts taken between two steps (one is taken in any case): their paths are
    computed on the compute thread. While no expert host answers requests wait, at most `host_patience_s`.
    """

    link: LinkOptions = field(default_factory=LinkOptions)
    idle_poll_s: float = IDLE_POLL_S
    prompt_tokens_per_turn: int = 512
    host_patience_s: float = 60.0


class LoopServer:
    """A compute thread's loop beside the link's I/O thread; `name` is what callers hear has ended with it."""

    name: str

    def __init__(self, link: EngineLink) -> None:
        self._link = link

    def status(self) -> dict[str, Any]:
        """Return what the compute thread is busy with, since when, and why requests are refused (or None)."""
        return {**self._link.activity.describe(), "unavailable": self._link.refusing}

    def describe(self) -> dict[str, Any]:
        """Return what doors are told who ask; from any thread."""
        return self._link.describe()

    def run(self, stop_event: StopEvent) -> None:
        """Serve until `stop_event` is set; then every request still running fails with UNAVAILABLE."""
        error = PregateError(f"internal error in the {self.name}")  # a bug ends the loop, and callers hear it at once
        self._link.start()
        try:
            while not stop_event.is_set():
                self._turn()
            error = UnavailableError(f"the {self.name} is stopping")
        finally:
            self._end(error)

    def _turn(self) -> None:
        raise NotImplementedError

    def _end(self, error: PregateError) -> None:
        self._link.stop(error)

    def _begin(self, pending: Pending) -> Sequence[Event | RouteReply]:
        """Hand a request on to be computed; returns what ends it already."""
        try:
            return self._take(pending.request, pending.arrived_s)
        except PregateError as error:
            return [FailedEvent(pending.request.request_id, error.code, str(error))]

    def _take(self, request: SubmitRequest | RouteRequest, arrived_s: float) -> Sequence[Event | RouteReply]:
        raise NotImplementedError


class EngineServer(LoopServer):
    """Serves one engine on `endpoint` (`ipc://PATH`, or `inproc://NAME` with a shared `context`).

    The endpoint is bound by the constructor, so doors may connect before `run` starts. Raises UserError for an
    endpoint that cannot be bound.
    """

    name = "engine"

    def __init__(
        self,
        engine: ServedEngine,
        endpoint: str,
        *,
        options: EngineServerOptions | None = None,
        context: zmq.Context | None = None,
    ) -> None:
        self._engine = engine
        self._options = options or EngineServerOptions()
        super().__init__(EngineLink(endpoint, engine.info, self._options.link, context, self.name))
        self._lost_s: float | None = None  # since when no host answers
        self._stuck_s: float | None = None  # since when no step came to its end for want of hosts
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Have the compute thread call a function between two steps, from any thread."""
        called: Future[Any] = Future()
        self._calls.put((function, called))
        return called

    @property
    def has_work(self) -> bool:
        """Whether a request runs or waits."""
        return self._engine.has_work or len(self._link.inbox) > 0

    def _end(self, error: PregateError) -> None:
        super()._end(error)
        self._engine.fail_all(error)

    def _turn(self) -> None:
        inbox, activity = self._link.inbox, self._link.activity
        while not self._calls.empty():
            function, called = self._calls.get()
            try:
                called.set_result(function())
            except Exception as error:
                logger.error("a call between two steps failed", exc_info=error)
                called.set_exception(error)
        if self._lost_s is not None or not self._engine.has_work:
            inbox.wait(self._options.idle_poll_s)
        refusing = True
        while refusing:  # whoever finds the queue full is told now: the bound of what waits is the queue's
            cancels, taken = inbox.take(self._options.prompt_tokens_per_turn)
            for request_id in cancels:
                self._engine.cancel(request_id)
            events: list[Event | RouteReply] = []
            if taken:
                with activity.doing(f"the paths of {len(taken)} prompts"):
                    events = [event for pending in taken for event in self._begin(pending)]
                self._link.publish(events)
            refusing = any(isinstance(e, FailedEvent) and e.code == QueueFullError.code for e in events)
        self._link.publish(self._advance())

    def _advance(self) -> Sequence[Event]:
        try:
            if self._lost_s is None and self._engine.has_work:
                with self._link.activity.doing("a step"):
                    events = self._engine.step()
                self._stuck_s = None
                return events
            self._engine.idle()
            self._recover()
        except HostLostError as error:
            return self._wait_for_hosts(error)
        except PregateError as error:
            logger.error("requests fail: %s", error)
            self._engine.fail_all(error)
            self._link.fail_requests(error)
        return ()

    def _take(self, request: SubmitRequest | RouteRequest, arrived_s: float) -> Sequence[Event | RouteReply]:
        if isinstance(request, RouteRequest):
            paths = PackedPaths.of(self._engine.route(request.token_ids))
            return [RouteReply(request.request_id, paths, None, str(self._engine.info()["version"]))]
        if self._link.refusing is not None:
            raise UnavailableError(self._link.refusing)
        if request.deadline_s is not None:
            left_s = request.deadline_s - (time.monotonic() - arrived_s)
            if left_s <= 0:
                return [FinishedEvent(request.request_id, "deadline", len(request.token_ids), 0, ())]
            request = replace(request, deadline_s=left_s)
        self._engine.submit(request)
        return ()

    def _wait_for_hosts(self, error: HostLostError) -> Sequence[Event]:
        """Nothing can be computed: what runs waits, to its deadline or our patience; new requests are refused."""
        if self._lost_s is None:
            self._lost_s = time.monotonic()
            logger.error("%s, and no other is left; requests wait until one answers", error)
            self._link.refuse(str(error))
        self._stuck_s = self._stuck_s or self._lost_s
        if self._engine.has_work and time.monotonic() - self._stuck_s > self._options.host_patience_s:
            logger.error("no expert host for %.0f s; requests fail", self._options.host_patience_s)
            self._engine.fail_all(error)
            self._link.fail_requests(error)
            self._stuck_s = None
        return self._engine.expire(error)

    def _recover(self) -> None:
        if self._lost_s is not None:
            logger.warning("an expert host answers again after %.1f s; requests go on", time.monotonic() - self._lost_s)
            self._lost_s = None
            self._link.refuse(None)
