"""What a process tells of itself: `Telemetry` says how it logs and whether it traces; spans follow one request across
processes.

Without an endpoint nothing of OpenTelemetry is loaded, and every span is `NO_SPAN`. As with logging, what `begin` sets
up is the process's.
"""

from __future__ import annotations

import contextvars
import re
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

from pregate.base import log
from pregate.base.errors import UserError

#: The W3C traceparent that a caller sent with the request the current task works for; "" without one.
given: contextvars.ContextVar[str] = contextvars.ContextVar("pregate_traceparent", default="")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
#: How long a process that ends waits for its last spans to leave.
_FLUSH_S = 2.0
_provider: Any = None


class Span(Protocol):
    """One part of a request's way. `traceparent` makes others its children; "" where it is not recorded."""

    traceparent: str

    def end(self, error: str = "", at_s: float | None = None, **attributes: Any) -> None:
        """It ends now, or at `at_s` (Unix time); `error` says why it failed."""
        ...


class _NoSpan:
    traceparent = ""

    def end(self, error: str = "", at_s: float | None = None, **attributes: Any) -> None:
        pass


NO_SPAN = _NoSpan()


@dataclass(frozen=True)
class Telemetry:
    """`otlp_endpoint`: an OTLP collector's HTTP address, whose path is /v1/traces where none is given."""

    log_format: log.Form = "text"
    otlp_endpoint: str | None = None

    def begin(self, role: str) -> None:
        """Let this process log, and trace, as `role`."""
        global _provider  # noqa: PLW0603 (see the module)
        log.configure(role, self.log_format)
        if self.otlp_endpoint is not None:
            _provider = _make_provider(role, self.otlp_endpoint)


#: Of a process that nobody has said anything else to.
PLAIN = Telemetry()


def begin_request(request_id: str | None, traceparent: str | None) -> None:
    """Take over what a caller sends with a request: its name, and what it is a part of."""
    log.name_request(request_id)
    given.set(traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else "")


def span(name: str, parent: str = "", *, root: bool = False, at_s: float | None = None, **attributes: Any) -> Span:
    """Begin a span, now or at `at_s` (Unix time). Without a parent there is none, but for a `root`, which begins a
    trace."""
    if _provider is None or not (parent or root):
        return NO_SPAN
    return _Span(name, parent, at_s, attributes)


def flush() -> None:
    """Send what has not left yet, for `_FLUSH_S` at most: the process is about to end."""
    if _provider is not None:  # its own bound holds for no batch that is under way
        sending = threading.Thread(target=_provider.force_flush, name="last-spans", daemon=True)
        sending.start()
        sending.join(_FLUSH_S)


class _Span:
    def __init__(self, name: str, parent: str, at_s: float | None, attributes: dict[str, Any]) -> None:
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator, carrier = TraceContextTextMapPropagator(), {}
        tracer, context = _provider.get_tracer("pregate"), propagator.extract({"traceparent": parent})
        self._span = tracer.start_span(name, context, attributes=attributes, start_time=_ns(at_s))
        if self._span.get_span_context().trace_flags.sampled:  # else those below are not recorded either
            propagator.inject(carrier, set_span_in_context(self._span))
        self.traceparent = carrier.get("traceparent", "")

    def end(self, error: str = "", at_s: float | None = None, **attributes: Any) -> None:
        from opentelemetry.trace import StatusCode

        for name, value in attributes.items():
            self._span.set_attribute(name, value)
        if error:
            self._span.set_status(StatusCode.ERROR, error)
        self._span.end(_ns(at_s))


def _ns(at_s: float | None) -> int:
    return int((time.time() if at_s is None else at_s) * 1e9)


def check_endpoint(endpoint: str | None) -> None:
    """UserError for what is no address of a collector."""
    if endpoint is not None and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", endpoint):
        raise UserError.of("--otlp-endpoint", endpoint, "allowed: http:// or https://, HOST:PORT, and a path")


def _make_provider(role: str, endpoint: str) -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from pregate import __version__

    whole = endpoint if re.fullmatch(r"https?://[^/]+/.+", endpoint) else endpoint.rstrip("/") + "/v1/traces"
    about = {"service.namespace": "pregate", "service.name": role, "service.version": __version__}
    provider = TracerProvider(resource=Resource.create(about))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=whole)))
    return provider
