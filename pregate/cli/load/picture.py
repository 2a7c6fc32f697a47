"""A picture of a load: how times spread, and how it went on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pregate.cli.load.outcome import Outcome


def draw(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """Write a PNG: left, which share of first tokens, gaps and answers came within a time; right, over the load, tokens
    a second and requests at work."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    done = [o for o in outcomes if not o.error and o.token_s]
    curves = {
        "first token": [o.first_token_s for o in done],
        "between tokens": [gap for o in done for gap in o.gaps_s],
        "whole answer": [o.ended_s - o.due_s for o in done],
    }
    for name, values in curves.items():
        if values:
            left.plot(np.sort(values) * 1000, (np.arange(len(values)) + 1) / len(values), label=name)
    left.set(xscale="log", xlabel="ms", ylabel="share within", ylim=(0, 1), title=title)
    left.grid(alpha=0.3)
    left.legend()
    ends = np.array([o.ended_s for o in outcomes])
    edges = np.linspace(0, max(1e-3, float(ends.max(initial=0))), 61)
    tokens, _ = np.histogram([t for o in done for t in o.token_s], edges)
    right.plot(edges[1:], tokens / np.diff(edges), label="tokens/s")
    due = np.array([o.due_s for o in outcomes])
    at_work = [(due <= t).sum() - (ends <= t).sum() for t in edges[1:]]
    beside = right.twinx()
    beside.plot(edges[1:], at_work, color="tab:orange", label="requests at work")
    right.set(xlabel="s", ylabel="tokens/s", ylim=(0, None))
    beside.set(ylabel="requests at work", ylim=(0, None))
    figure.legend(handles=[*right.get_lines(), *beside.get_lines()], loc="outside lower right", ncols=2)
    figure.savefig(path, dpi=120)
