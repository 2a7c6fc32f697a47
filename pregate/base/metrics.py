"""`METRICS`: every number a server shows. The plain endpoint, Ray's exporter, dashboard and alarms are made of it.

Names are vLLM's where it has the same number, after one prefix. Requests are counted by the front door they came
through: add doors up. What an engine and its hosts count is the same at every door of theirs: take the greatest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

PREFIX = "pregate_"
#: On every series.
COMMON_LABELS = ("model_name",)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0)
_SHORT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
_TOKENS = tuple(float(4**n) for n in range(11))
_Read = Callable[[Mapping[str, Any]], float]


@dataclass(frozen=True)
class Metric:
    """One number; a counter's name ends in `_total`. `read` takes it from `EngineClient.info()` or, with the label
    host, from one of its `hosts`; None: a door counts it."""

    stem: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    read: _Read | None = None

    @property
    def name(self) -> str:
        return PREFIX + self.stem

    @property
    def series(self) -> tuple[str, ...]:
        """The names that PromQL knows it by."""
        if self.kind != "histogram":
            return (self.name,)
        return tuple(self.name + end for end in ("_bucket", "_sum", "_count"))


def _key(name: str) -> _Read:
    return lambda info: float(info[name])


def _times(stem: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Metric:
    return Metric(stem, "histogram", text, buckets=buckets)


def _engine(kind: Literal["counter", "gauge"], stem: str, key: str, text: str) -> Metric:
    return Metric(stem, kind, text, read=_key(key))


def _host(kind: Literal["counter", "gauge"], stem: str, key: str, text: str) -> Metric:
    return Metric(stem, kind, text, ("host",), read=_key(key))


_OF_REQUESTS = (
    _times("time_to_first_token_seconds", "From a request's arrival at the door to its first token."),
    _times("inter_token_latency_seconds", "Between tokens of a request, at the door.", _SHORT_SECONDS),
    _times("e2e_request_latency_seconds", "From a request's arrival at the door to its end."),
    _times("request_queue_time_seconds", "From the engine's taking a request to its first step."),
    _times("request_prefill_time_seconds", "From a request's first step to its first token."),
    _times("request_decode_time_seconds", "From a request's first token to its last."),
    _times("route_seconds", "A door's wait for the paths of a prompt.", _SHORT_SECONDS),
    Metric("request_prompt_tokens", "histogram", "Tokens of a prompt.", buckets=_TOKENS),
    Metric("request_generation_tokens", "histogram", "Tokens of a text that has ended.", buckets=_TOKENS),
    Metric("prompt_tokens_total", "counter", "Tokens of prompts taken."),
    Metric("generation_tokens_total", "counter", "Tokens generated."),
    Metric("request_success_total", "counter", "Texts ended: stop, length or abort.", ("finished_reason",)),
    Metric("request_failures_total", "counter", "Requests that ended in an error, by gRPC status.", ("code",)),
    Metric(
        "admission_rejections_total", "counter", "Requests turned away unserved: queue_full, unavailable.", ("reason",)
    ),
    Metric("num_requests_at_door", "gauge", "Texts that this door waits for."),
)
OF_PATHS = (
    Metric(
        "num_requests_waiting_for_paths",
        "gauge",
        "Prompts at the path service.",
        read=lambda info: info.get("num_waiting_for_paths", 0),
    ),
)
_OF_STEPS = (
    Metric("engine_up", "gauge", "1 while the engine answers and takes requests.", read=lambda i: not i["unavailable"]),
    _engine("gauge", "engine_busy_seconds", "busy_s", "How long the engine has been at what it does; 0 while idle."),
    _engine("gauge", "num_requests_running", "num_running", "Requests in the engine's steps."),
    _engine("gauge", "num_requests_waiting", "num_queued", "Requests in the engine's queue."),
    _engine("gauge", "queue_bytes", "queued_bytes", "What waiting requests hold, of --max-queued-bytes."),
    Metric(
        "kv_cache_usage_perc", "gauge", "KV blocks in use; 1 is all of them.",
        read=lambda info: 1 - info["kv_blocks_free"] / max(1, info["kv_blocks"]),
    ),
    _engine("counter", "num_preemptions_total", "num_preempted", "Requests that gave up their KV blocks."),
    _engine("counter", "prefix_cache_hits_total", "prefix_tokens", "Tokens of prompts found in the KV cache."),
    _engine("counter", "steps_total", "num_steps", "Steps begun."),
    _engine("counter", "step_seconds_total", "step_s", "Time in steps."),
    _engine("counter", "step_tokens_total", "num_step_tokens", "Tokens of all steps."),
    _engine("counter", "step_units_total", "num_step_units", "Experts asked for by all steps, where paths are exact."),
)  # fmt: skip
#: What hosts count themselves: every engine says it alike.
_OF_HOSTS = (
    Metric("path_exact", "gauge", "1 where paths decide, 0 where gates do.", read=lambda i: i["routing"] == "path"),
    Metric("num_expert_hosts", "gauge", "Expert hosts the engine works with.", read=lambda info: len(info["hosts"])),
    Metric("expert_host_up", "gauge", "0 while the host is lost.", ("host",), read=lambda host: not host["lost"]),
    _host("gauge", "expert_resident", "num_units", "Experts in the host's slots."),
    _host("gauge", "expert_pending", "num_pending", "Experts the host means to fetch."),
    _host("counter", "expert_cache_hits_total", "hits", "Uses that found their expert in its slot."),
    _host("counter", "expert_cache_misses_total", "misses", "Uses that did not."),
    _host("counter", "expert_stall_seconds_total", "stall_s", "Time that computing waited for experts."),
    _host("counter", "expert_read_bytes_total", "read_bytes", "Bytes brought into slots, from files or memory."),
    _host("counter", "expert_prefetch_bytes_total", "prefetched_bytes", "Of those: before they were asked for."),
    _host("counter", "expert_prefetch_wasted_bytes_total", "wasted_bytes", "Of those: left again unused."),
)
#: What an engine counts of its hosts: of several engines it is added up.
_OF_DISPATCH = (
    _host("counter", "expert_rows_total", "rows", "(token, layer, expert) rows the host computed."),
    _host("counter", "dispatch_groups_total", "groups", "Groups of rows sent to the host, one a layer of a step."),
    _host("counter", "dispatch_resent_total", "resent_groups", "Groups sent again."),
    _host("counter", "dispatch_plan_bytes_total", "plan_bytes", "Bytes of plans sent to the host."),
    _host("counter", "dispatch_row_bytes_total", "group_bytes", "Bytes of rows sent to the host."),
    _host("counter", "dispatch_answer_bytes_total", "reply_bytes", "Bytes of rows that came back."),
    _host("counter", "dispatch_wait_seconds_total", "wait_s", "Time the engine waited for the host's answers."),
)
#: What an engine knows, of itself and of its hosts; and what one of several has to say beside the first.
OF_ENGINE = (*_OF_STEPS, *_OF_HOSTS, *_OF_DISPATCH)
OF_NEXT_ENGINE = (*_OF_STEPS, *_OF_DISPATCH)
METRICS = (*_OF_REQUESTS, *OF_PATHS, *OF_ENGINE)
BY_STEM: Mapping[str, Metric] = {metric.stem: metric for metric in METRICS}


def samples(
    metrics: Sequence[Metric], info: Mapping[str, Any]
) -> Iterator[tuple[Metric, list[tuple[tuple[str, ...], float]]]]:
    """Read each of these metrics from what `EngineClient.info()` returned: its labels' values and its own."""
    for metric in metrics:
        assert metric.read is not None, "a door counts it"
        if metric.labels:
            yield metric, [((str(host["host_id"]),), float(metric.read(host))) for host in info["hosts"]]
        else:
            yield metric, [((), float(metric.read(info)))]
