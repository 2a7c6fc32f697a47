"""`DoorRegistry`: a front door's numbers, and its engine's and hosts', as Prometheus reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from pregate.base.errors import PregateError
from pregate.base.metrics import BY_STEM, COMMON_LABELS, METRICS, OF_ENGINE, OF_PATHS, Metric, samples
from pregate.router.doors.service import DoorService

#: How long a scrape waits for the engine; then it says engine_up 0 and gives the door's own numbers.
ENGINE_PATIENCE_S = 2.0


class DoorRegistry(Collector):
    """Records what `service` counts from now on. Engine and hosts are asked when somebody scrapes, and at no other
    time."""

    def __init__(self, service: DoorService) -> None:
        self._service, self._info = service, None
        self._registry = CollectorRegistry()
        self._record: dict[tuple[str, ...], Callable[[float], None]] = {}
        self._instruments = {m.stem: self._instrument(m) for m in METRICS if m.read is None}
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        service.metrics.recorders.append(self)

    def record(self, metric: Metric, value: float, labels: tuple[str, ...]) -> None:
        key = (metric.stem, *labels)
        found = self._record.get(key)
        if found is None:
            found = self._record[key] = self._recorder(metric, labels)
        found(value)

    async def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the text of one scrape, and its content type, as the header `accept` prefers."""
        self._info = await ask_engine(self._service)
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Family]:
        """What engine and hosts count; Prometheus's client calls it."""
        info = self._info
        silent = ((BY_STEM["engine_up"], [((), 0.0)]),)  # it is not up: that is all there is to say
        for metric, found in silent if info is None else samples((*OF_PATHS, *OF_ENGINE), info):
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=(*COMMON_LABELS, *metric.labels))
            for labels, value in found:
                family.add_metric((self._service.model_name, *labels), value)
            yield family

    def describe(self) -> Iterator[Family]:
        yield from ()

    def _instrument(self, metric: Metric) -> Counter | Gauge | Histogram:
        labels = (*COMMON_LABELS, *metric.labels)
        if metric.kind == "histogram":
            made = Histogram(metric.name, metric.help, labels, registry=self._registry, buckets=metric.buckets)
        else:
            kind = Counter if metric.kind == "counter" else Gauge
            made = kind(metric.name, metric.help, labels, registry=self._registry)
        if not metric.labels:
            made.labels(self._service.model_name)  # 0 before the first event
        return made

    def _recorder(self, metric: Metric, labels: tuple[str, ...]) -> Callable[[float], None]:
        child = self._instruments[metric.stem].labels(self._service.model_name, *labels)
        if isinstance(child, Counter):
            return child.inc
        return child.set if isinstance(child, Gauge) else child.observe


async def ask_engine(service: DoorService) -> dict[str, Any] | None:
    """Return the engine's info; None where it gives no answer in time."""
    try:
        return await asyncio.wait_for(service.model_info(), ENGINE_PATIENCE_S)
    except (PregateError, asyncio.TimeoutError):
        return None
