"""What a front door counts of its requests: `RequestMetrics` per door, in it a `RequestWatch` each."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Protocol

from pregate.base.errors import PregateError, QueueFullError, UnavailableError, logged
from pregate.base.log import get_logger, request_id
from pregate.base.metrics import BY_STEM, Metric
from pregate.base.telemetry import given, span
from pregate.router.link.messages import FinishedEvent

logger = get_logger(__name__)


class Recorder(Protocol):
    """Where numbers go: a Prometheus registry, Ray's exporter."""

    def record(self, metric: Metric, value: float, labels: tuple[str, ...]) -> None:
        """Add `value` to a counter or a histogram, or set a gauge to it; `labels` as the metric names them."""
        ...


class RequestMetrics:
    """One door's. Without `recorders` nothing is kept."""

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []

    def record(self, stem: str, value: float = 1.0, *labels: str) -> None:
        """Give one value of the metric of that stem to every recorder."""
        for recorder in self.recorders:
            recorder.record(BY_STEM[stem], value, labels)

    def watch(self, num_texts: int) -> RequestWatch:
        """Follow a request for so many texts, inside a `with`."""
        return RequestWatch(self, num_texts)


class RequestWatch:
    """A request from now on. What ends its block counts: an error, or the caller's leaving before all texts ended."""

    def __init__(self, metrics: RequestMetrics, num_texts: int) -> None:
        self.metrics, self.num_left, self.num_tokens = metrics, num_texts, 0
        self.came_s = time.monotonic()
        self._span = span("request", given.get(), root=True, request_id=request_id.get(), texts=num_texts)

    @property
    def traceparent(self) -> str:
        """What other processes' parts of the request are traced under."""
        return self._span.traceparent

    def taken(self, num_prompt_tokens: int) -> None:
        """Its prompt is read, and goes to the engine."""
        logger.info("taken: %d prompt tokens, %d texts", num_prompt_tokens, self.num_left)
        self.metrics.record("prompt_tokens_total", num_prompt_tokens)
        self.metrics.record("request_prompt_tokens", num_prompt_tokens)

    def text(self) -> TextWatch:
        return TextWatch(self)

    def __enter__(self) -> RequestWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        said = "" if kind is None else kind.__name__
        if isinstance(error, PregateError):
            said = logged(error.code, str(error))
        self._span.end(said, tokens=self.num_tokens)
        if isinstance(error, (GeneratorExit, asyncio.CancelledError)):
            logger.info("the caller left; %d texts had not ended", self.num_left)
            for _ in range(self.num_left):
                self.metrics.record("request_success_total", 1, "abort")
        elif isinstance(error, QueueFullError):
            self.metrics.record("admission_rejections_total", 1, "queue_full")
        elif isinstance(error, UnavailableError) and not self.num_tokens:
            self.metrics.record("admission_rejections_total", 1, "unavailable")
        elif error is not None:
            code = error.code if isinstance(error, PregateError) else PregateError.code
            self.metrics.record("request_failures_total", 1, code)


class TextWatch:
    """One text of a request. Tokens that come together count as evenly spaced since those before."""

    def __init__(self, request: RequestWatch) -> None:
        self._request, self._record = request, request.metrics.record
        self._last_s: float | None = None
        self._num_tokens = 0

    def tokens(self, num: int) -> None:
        """So many new ones are there."""
        now_s = time.monotonic()
        if self._last_s is None:
            self._record("time_to_first_token_seconds", now_s - self._request.came_s)
        else:
            for _ in range(num):
                self._record("inter_token_latency_seconds", (now_s - self._last_s) / num)
        self._last_s = now_s
        self._num_tokens += num
        self._request.num_tokens += num
        self._record("generation_tokens_total", num)

    def ended(self, reason: str, end: FinishedEvent | None) -> None:
        """It has ended so; `end` is the engine's word, None where the door ended it."""
        self._request.num_left -= 1
        logger.info("text ended: %s after %d tokens", reason, self._num_tokens)
        self._record("request_success_total", 1, reason)
        self._record("e2e_request_latency_seconds", time.monotonic() - self._request.came_s)
        self._record("request_generation_tokens", self._num_tokens)
        if end is not None:
            self._record("request_queue_time_seconds", end.queue_s)
            self._record("request_prefill_time_seconds", end.prefill_s)
            self._record("request_decode_time_seconds", end.decode_s)
