"""The Grafana dashboard, made of panels over the list of metrics: `python -m pregate.base.dashboard PATH`.

A door's own numbers are added up over doors. What engine and hosts count every door of theirs shows alike, so the
greatest over doors is taken. Under Ray's exporter every name begins with `ray_`: the variable `prefix` is that.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from pregate.base.metrics import BY_STEM

_MODEL = 'model_name=~"$model"'
_RATE = "[$__rate_interval]"
#: A query as written below: what it computes, and the words of its legend.
_Query = tuple[str, str]


def rate(stem: str, by: str = "") -> str:
    """Per second: of a door's counter the sum, of an engine's or a host's the greatest over doors."""
    return f"{'sum' if BY_STEM[stem].read is None else 'max'}{_by(by)}(rate({_series(stem)}{_RATE}))"


def now(stem: str, by: str = "") -> str:
    """A gauge as it stands: of a door's the sum, of an engine's or a host's the greatest over doors."""
    return f"{'sum' if BY_STEM[stem].read is None else 'max'}{_by(by)}({_series(stem)})"


def quantile(stem: str, share: float) -> str:
    """A quantile of a histogram, over all doors."""
    return f"histogram_quantile({share}, sum by (le) (rate({_series(stem, '_bucket')}{_RATE})))"


def _series(stem: str, end: str = "") -> str:
    return f"${{prefix}}{BY_STEM[stem].name}{end}{{{_MODEL}}}"


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else " "


def _quantiles(stem: str) -> list[_Query]:
    return [(quantile(stem, share), f"p{share * 100:g}") for share in (0.5, 0.9, 0.99)]


def _share(part: str, others: str, by: str) -> str:
    return f"{rate(part, by)} / ({rate(part, by)} + {rate(others, by)})"


def _rows() -> dict[str, list[tuple[str, str, list[_Query]]]]:
    """Titles of rows; in each row the panels: title, unit, queries."""
    return {
        "At a glance": [
            ("Engine takes requests", "bool_yes_no", [(f"min({_series('engine_up')})", "up")]),
            ("Requests ended", "reqps", [(rate("request_success_total", "finished_reason"), "{{finished_reason}}")]),
            (
                "Refused and failed", "reqps",
                [
                    (rate("admission_rejections_total", "reason"), "refused: {{reason}}"),
                    (rate("request_failures_total", "code"), "failed: {{code}}"),
                ],
            ),
            (
                "Tokens", "tokens/s",
                [(rate("prompt_tokens_total"), "of prompts"), (rate("generation_tokens_total"), "generated")],
            ),
        ],
        "Requests": [
            ("Time to first token", "s", _quantiles("time_to_first_token_seconds")),
            ("Between tokens", "s", _quantiles("inter_token_latency_seconds")),
            ("To the end", "s", _quantiles("e2e_request_latency_seconds")),
            (
                "Where time goes (p90)", "s",
                [
                    (quantile(f"request_{part}_time_seconds", 0.9), part) for part in ("queue", "prefill", "decode")
                ] + [(quantile("route_seconds", 0.9), "paths")],
            ),
            ("Prompt tokens", "short", _quantiles("request_prompt_tokens")),
            ("Generated tokens", "short", _quantiles("request_generation_tokens")),
        ],
        "Engine": [
            (
                "Requests", "short",
                [
                    (now("num_requests_running"), "running"),
                    (now("num_requests_waiting"), "waiting"),
                    (now("num_requests_waiting_for_paths"), "waiting for paths"),
                    (now("num_requests_at_door"), "at doors"),
                ],
            ),
            ("KV cache in use", "percentunit", [(now("kv_cache_usage_perc"), "in use")]),
            (
                "Seconds of a step", "s",
                [
                    (f"{rate('step_seconds_total')} / {rate('steps_total')}", "mean"),
                    (now("engine_busy_seconds"), "at the present one"),
                ],
            ),
            (
                "A step has", "short",
                [
                    (f"{rate('step_tokens_total')} / {rate('steps_total')}", "tokens"),
                    (f"{rate('step_units_total')} / {rate('steps_total')}", "experts"),
                ],
            ),
            (
                "Found and given up", "short",
                [
                    (rate("prefix_cache_hits_total"), "tokens found in the cache, a second"),
                    (rate("num_preemptions_total"), "preemptions a second"),
                ],
            ),
            ("What waits holds", "bytes", [(now("queue_bytes"), "queue")]),
        ],
        "Experts, by host": [
            ("Rows", "rows/s", [(rate("expert_rows_total", "host"), "host {{host}}")]),
            (
                "Balance: mean of hosts by the greatest", "percentunit",
                [(f"avg({rate('expert_rows_total', 'host')}) / max({rate('expert_rows_total', 'host')})", "rows")],
            ),
            (
                "Hit rate", "percentunit",
                [(_share("expert_cache_hits_total", "expert_cache_misses_total", "host"), "host {{host}}")],
            ),
            ("Computing waits for experts", "percentunit", [(rate("expert_stall_seconds_total", "host"), "{{host}}")]),
            (
                "Experts held, and to fetch", "short",
                [
                    (now("expert_resident", "host"), "host {{host}} holds"),
                    (now("expert_pending", "host"), "host {{host}} fetches"),
                ],
            ),
            (
                "Read", "Bps",
                [
                    (rate("expert_read_bytes_total", "host"), "host {{host}}"),
                    (rate("expert_prefetch_bytes_total", "host"), "host {{host}}, ahead"),
                    (rate("expert_prefetch_wasted_bytes_total", "host"), "host {{host}}, for nothing"),
                ],
            ),
        ],
        "Dispatch, by host": [
            ("Engine waits for answers", "percentunit", [(rate("dispatch_wait_seconds_total", "host"), "{{host}}")]),
            (
                "Bytes", "Bps",
                [
                    (rate("dispatch_row_bytes_total", "host"), "host {{host}}, rows"),
                    (rate("dispatch_answer_bytes_total", "host"), "host {{host}}, answers"),
                    (rate("dispatch_plan_bytes_total", "host"), "host {{host}}, plans"),
                ],
            ),
            (
                "Groups", "short",
                [
                    (rate("dispatch_groups_total", "host"), "host {{host}}"),
                    (rate("dispatch_resent_total", "host"), "host {{host}}, sent again"),
                ],
            ),
            (
                "Hosts; 1: it is up, paths are exact", "short",
                [
                    (now("num_expert_hosts"), "hosts"),
                    (now("path_exact"), "paths are exact"),
                    (now("expert_host_up", "host"), "host {{host}} is up"),
                ],
            ),
        ],
    }  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Return Grafana's JSON."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in _rows().items():
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}})
        width = 24 // (4 if len(row) == 4 else 3)
        for number, panel in enumerate(row):
            line, column = divmod(number, 24 // width)
            place = {"x": column * width, "y": top + 1 + 7 * line, "w": width, "h": 7}
            panels.append(_panel(*panel, place))
        top += 1 + 7 * -(-len(row) * width // 24)
    for number, panel in enumerate(panels, start=1):
        panel["id"] = number
    return {
        "title": "pregate",
        "uid": "pregate",
        "tags": ["pregate"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _panel(title: str, unit: str, queries: list[_Query], place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    targets = [
        {"refId": chr(ord("A") + n), "expr": expression, "legendFormat": legend, "datasource": source}
        for n, (expression, legend) in enumerate(queries)
    ]
    units = {"tokens/s": "suffix: tokens/s", "rows/s": "suffix: rows/s"}
    defaults = {"unit": units.get(unit, unit), "min": 0, "custom": {"fillOpacity": 8, "showPoints": "never"}}
    return {
        "type": "stat" if unit == "bool_yes_no" else "timeseries",
        "title": title,
        "description": " ".join(dict.fromkeys(BY_STEM[stem].help for q, _ in queries for stem in stems(q))),
        "datasource": source,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "gridPos": place,
        "targets": targets,
    }


def stems(expression: str) -> list[str]:
    """Return the stems of the metrics that an expression names. Raises KeyError for a name that the list has not."""
    by_series = {name: metric.stem for metric in BY_STEM.values() for name in metric.series}
    return [by_series[name] for name in re.findall(r"pregate_\w+", expression)]


def _variables() -> list[dict[str, Any]]:
    prefix = {"name": "prefix", "label": "Exporter", "type": "custom", "query": "pregate : ,Ray : ray_"}
    model = f"label_values(${{prefix}}{BY_STEM['engine_up'].name}, model_name)"
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        prefix | {"current": {"text": "pregate", "value": ""}},
        {
            "name": "model",
            "label": "Model",
            "type": "query",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "query": {"query": model, "refId": "model"},
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
            "refresh": 2,
        },
    ]


def main() -> None:
    """Write the dashboard to the path that is the argument."""
    Path(sys.argv[1]).write_text(json.dumps(dashboard(), indent=1) + "\n")


if __name__ == "__main__":
    main()
