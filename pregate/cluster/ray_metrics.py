"""The numbers of `METRICS` through Ray's exporter, under their own names, before which Ray puts `ray_`.

Each process gives what it has itself: a door what it counts, as it counts it; engine and path service what they know of
themselves and of hosts, every few seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from pregate.base.log import get_logger
from pregate.base.metrics import COMMON_LABELS, Metric, samples

#: Between two looks at what an engine says of itself; Ray reports every ten seconds.
LOOK_EVERY_S = 5.0

logger = get_logger(__name__)


def exports() -> bool:
    """Whether this Ray exports metrics; the one that `pregate serve` starts does not."""
    return any(node["Alive"] and node.get("MetricsExportPort", 0) > 0 for node in ray.nodes())


class RayRecorder:
    """Where a door's numbers go (`request_watch.Recorder`). Ray must be connected.

    Ray forgets a gauge that is not set for two of its reports, so with `repeats` those without labels are set again and
    again, by a thread.
    """

    def __init__(self, model_name: str, repeats: bool = True) -> None:
        self._model_name = model_name
        self._instruments: dict[str, Counter | Gauge | Histogram] = {}
        self._set: dict[str, tuple[Gauge, float]] = {}
        if repeats:
            threading.Thread(target=self._set_again, name="ray-gauges", daemon=True).start()

    def record(self, metric: Metric, value: float, labels: tuple[str, ...]) -> None:
        instrument = self._instruments.get(metric.stem)
        if instrument is None:
            instrument = self._instruments[metric.stem] = _instrument(metric)
        tags = dict(zip((*COMMON_LABELS, *metric.labels), (self._model_name, *labels), strict=True))
        if isinstance(instrument, Counter):
            if value > 0:  # Ray takes no 0
                instrument.inc(value, tags)
        elif isinstance(instrument, Gauge):
            instrument.set(value, tags)
            if not labels:
                self._set[metric.stem] = instrument, value
        else:
            instrument.observe(value, tags)

    def _set_again(self) -> None:
        while True:
            time.sleep(LOOK_EVERY_S)
            for gauge, value in list(self._set.values()):
                gauge.set(value, {COMMON_LABELS[0]: self._model_name})


def _instrument(metric: Metric) -> Counter | Gauge | Histogram:
    labels = (*COMMON_LABELS, *metric.labels)
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.help, list(metric.buckets), labels)
    return (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.help, labels)


def follow(model_name: str, metrics: Sequence[Metric], describe: Callable[[], Mapping[str, Any]]) -> None:
    """Give these metrics of what `describe` returns, from now on until the process ends, in a thread of its own."""
    threading.Thread(target=_follow, args=(model_name, metrics, describe), name="ray-metrics", daemon=True).start()


def _follow(model_name: str, metrics: Sequence[Metric], describe: Callable[[], Mapping[str, Any]]) -> None:
    recorder, last = RayRecorder(model_name, repeats=False), {}
    while True:
        try:
            for metric, found in samples(metrics, describe()):
                for labels, value in found:
                    before = 0.0
                    if metric.kind == "counter":  # of a host that was started again it begins anew
                        before, last[metric.stem, labels] = last.get((metric.stem, labels), 0.0), value
                    recorder.record(metric, value - before if value >= before else value, labels)
        except Exception:
            logger.exception("metrics were not given to Ray; they are again in %.0f s", LOOK_EVERY_S)
        time.sleep(LOOK_EVERY_S)
