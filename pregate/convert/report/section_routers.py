"""The sections on routers: how path, gate and oracle agree by layer, and how the training went."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pregate.convert.control_table import RANDOM
from pregate.convert.report.figures import Agreement, Figures, TrainingCurve
from pregate.convert.report.parts import conditions, row, table
from pregate.convert.report.svg import Axis, Point, Series, both, chart, linear_axis
from pregate.convert.report.words import number, percent

#: Pairs in the order of the table, and their colours.
PAIRS = {("path", "oracle"): "c0", ("gate", "oracle"): "c2", ("path", "gate"): "c3"}
CURVE_NAMES = {
    "loss": "Loss",
    "cross_entropy": "Cross entropy, nats per token",
    "kl": "Divergence from the teacher, nats per token",
    "validation_perplexity": "Perplexity on held-back text",
    "active_share": "Share of the FFN that runs",
    "learning_rate": "Learning rate",
}
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


def training_section(figures: Figures) -> str:
    """Curves of a training, where the checkpoint keeps them."""
    parts = [_curve(curve) for curve in figures.training]
    if not parts:
        parts.append(
            "<p>No training curve: the folder has no <code>training.jsonl</code>, which <code>pregate tune</code> "
            "writes beside the weights it trained.</p>"
        )
    losses = figures.router_losses
    if {"loss_first", "loss_last"} <= losses.keys():
        words = f"{number(losses['loss_first'])} at the first step, {number(losses['loss_last'])} over the last 5 %"
        parts.append(f"<p>Path router, training loss: {words} (from the manifest; on the text it was trained on).</p>")
    return "".join(parts)


def _curve(curve: TrainingCurve) -> str:
    title = escape(CURVE_NAMES.get(curve.name, curve.name))
    return f"<h3>{title}</h3><figure>{both(lambda width: _curve_chart(curve, width))}</figure>"


def _curve_chart(curve: TrainingCurve, width: int) -> str:
    x = linear_axis("step", min(curve.steps), max(curve.steps), lambda v: f"{v:,.0f}")
    y = linear_axis("", min(curve.values), max(curve.values), lambda v: f"{v:g}", 4)
    last, points = len(curve.steps) - 1, []
    for index, (step, value) in enumerate(zip(curve.steps, curve.values, strict=True)):
        note = f"step {step:,.0f}: {number(value)}"
        points.append(Point(step, value, note, number(value) if index == last else ""))
    series = Series("c0", tuple(points), "solid", marks=len(points) < 40)
    return chart(curve.name, [series], x, y, width, 190)
