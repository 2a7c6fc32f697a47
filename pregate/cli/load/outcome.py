"""`Outcome`: what one request came to, and the figures of many. Pure.

Times count from when a request was due, not from when it could be sent: a load that falls behind is no excuse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Outcome:
    """`token_s` are the times at which tokens came, several at a time perhaps, and `ended_s` the end, all counted from
    the beginning of the load. `error` is a status name, empty for an answer."""

    due_s: float
    prompt_tokens: int
    token_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    error: str = ""

    @property
    def first_token_s(self) -> float:
        return self.token_s[0] - self.due_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds of each token after the first: those that come together share the time since the ones before."""
        gaps: list[float] = []
        times, counts = np.unique(self.token_s, return_counts=True)
        if len(times):
            gaps += [0.0] * (int(counts[0]) - 1)
            for gap, count in zip(np.diff(times), counts[1:], strict=True):
                gaps += [float(gap) / int(count)] * int(count)
        return gaps


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, and the values that 95 and 99 in a hundred do not exceed, in milliseconds; empty of none."""
    if not len(values):
        return {}
    shown = {"mean": np.mean(values), **{f"p{q}": np.percentile(values, q) for q in (50, 95, 99)}}
    return {name: round(float(value) * 1000, 3) for name, value in shown.items()}


def figures(outcomes: Sequence[Outcome], ttft_bound_s: float, itl_bound_s: float) -> dict[str, Any]:
    """What a load came to: times in ms, rates a second. Throughput counts from the first request's due time to the last
    end; good are answers within both bounds."""
    done = [o for o in outcomes if not o.error and o.token_s]
    gaps = [o.gaps_s for o in done]
    whole_s = max((o.ended_s for o in outcomes), default=0.0) - min((o.due_s for o in outcomes), default=0.0)
    whole_s = max(whole_s, 1e-9)
    good = sum(
        o.first_token_s <= ttft_bound_s and (not g or np.mean(g) <= itl_bound_s)
        for o, g in zip(done, gaps, strict=True)
    )
    errors = Counter(o.error for o in outcomes if o.error)
    return {
        "requests": {"sent": len(outcomes), "answered": len(done), **dict(sorted(errors.items()))},
        "seconds": round(whole_s, 3),
        "time_to_first_token_ms": spread([o.first_token_s for o in done]),
        "inter_token_ms": spread([gap for some in gaps for gap in some]),
        "end_to_end_ms": spread([o.ended_s - o.due_s for o in done]),
        "requests_per_s": round(len(done) / whole_s, 3),
        "output_tokens_per_s": round(sum(len(o.token_s) for o in done) / whole_s, 3),
        "prompt_tokens_per_s": round(sum(o.prompt_tokens for o in done) / whole_s, 3),
        "good_requests_per_s": round(good / whole_s, 3),
        "good_share_of_sent": round(good / max(1, len(outcomes)), 4),
    }
