"""The section on routers: how path, gate and oracle agree by layer."""

from __future__ import annotations

from collections.abc import Sequence

from pregate.convert.measure.control_table import RANDOM
from pregate.convert.report.figures import Agreement, Figures
from pregate.convert.report.parts import conditions, row, table
from pregate.convert.report.svg import Axis, Point, Series, both, chart, linear_axis
from pregate.convert.report.words import percent

#: Pairs in the order of the table, and their colours.
PAIRS = {("path", "oracle"): "c0", ("gate", "oracle"): "c2", ("path", "gate"): "c3"}
Line = tuple[tuple[str, str], list[Agreement]]


def agreement_section(figures: Figures) -> str:
    """How often path, gate and oracle choose alike, by layer."""
    if not figures.agreements:
        return "<p>No layer leaves a choice (all of its routed experts are active): there is nothing to compare.</p>"
    found = {pair: [a for a in figures.agreements if (a.first, a.second) == pair] for pair in PAIRS}
    lines = [(pair, layers) for pair, layers in found.items() if layers]
    picture = both(lambda width: _chart(figures, lines, width))
    path = "" if found[("path", "oracle")] else " This checkpoint has no path router."
    head = ("", "picks in common", "lowest layer", "all picks equal")
    return (
        f"<p>Higher is better. For each layer: the share of picks in common, a token at a time.{path} All are asked "
        "about the hidden states that this checkpoint's own routing leads to.</p><figure>"
        f"{picture}</figure>{table(head, [_row(*line) for line in lines])}{conditions(figures)}"
    )


def _chart(figures: Figures, lines: Sequence[Line], width: int) -> str:
    layers = [a.layer for a in figures.agreements]
    low, high = min(layers), max(layers)
    series = [_line(pair, agreements) for pair, agreements in lines]
    lowest = min(a.mean_overlap for a in figures.agreements)
    random = figures.quality.point(RANDOM)
    if random is not None and random.mean_overlap is not None:
        chance, note = random.mean_overlap, f"random experts: {percent(random.mean_overlap)}"
        ends = (Point(low, chance, note), Point(high, chance, note, "random experts"))
        series.insert(0, Series("c4", ends, "dashed", marks=False))
        lowest = min(lowest, chance)
    wide = width > 600
    ticks = tuple(range(low, high + 1, max(1, (high - low) // 8)))
    x = Axis("layer", low, max(high, low + 1), ticks, lambda v: f"{v:.0f}")  # one layer has no span of its own
    y = linear_axis("picks in common", lowest, 1.0, lambda v: percent(v, 0), 5)
    return chart("picks in common by layer", series, x, y, width, 300 if wide else 260)


def _line(pair: tuple[str, str], agreements: Sequence[Agreement]) -> Series:
    name, points = " and ".join(pair), []
    for index, a in enumerate(agreements, 1):
        note = f"layer {a.layer}, {name}: {percent(a.mean_overlap)} of picks, {percent(a.same_set)} whole sets"
        points.append(Point(a.layer, a.mean_overlap, note, name if index == len(agreements) else ""))
    return Series(PAIRS[pair], tuple(points), "solid")


def _row(pair: tuple[str, str], layers: Sequence[Agreement]) -> str:
    mean = sum(a.mean_overlap for a in layers) / len(layers)
    same = sum(a.same_set for a in layers) / len(layers)
    worst = min(layers, key=lambda a: a.mean_overlap)
    lowest = f"{percent(worst.mean_overlap)} (layer {worst.layer})"
    return row([" and ".join(pair), percent(mean), lowest, percent(same)])
