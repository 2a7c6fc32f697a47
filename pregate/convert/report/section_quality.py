"""The section on quality: perplexity against active share, of the checkpoint and all it is compared with."""

from __future__ import annotations

from html import escape
from math import isfinite

from pregate.convert.measure.control_table import DENSE, LINEAR, ORACLE, ORACLE_FIXED, PAPER, PATH, RANDOM, STATIC
from pregate.convert.report.figures import Curve, Figures, QualityPoint
from pregate.convert.report.parts import conditions, row, table
from pregate.convert.report.svg import Point, Series, both, chart, linear_axis, log_axis
from pregate.convert.report.words import number, number_short, percent

#: What each control is, in words for somebody who meets it here first.
MEANINGS = {
    DENSE: "the model before the cut: everything runs",
    STATIC: "no routing: the strongest neurons of each layer, always the same ones",
    RANDOM: "each token gets experts at random",
    PAPER: "CMoE's gate: one neuron speaks for each expert",
    LINEAR: "a gate in each layer, which reads that layer's input as the model runs",
    PATH: "reads token ids alone and fixes all experts before the model runs",
    ORACLE: "the experts of greatest contribution, which nothing can know beforehand",
    ORACLE_FIXED: "the oracle when every token gets equally many experts",
}
COLOURS = {
    DENSE: "c4",
    STATIC: "c3",
    RANDOM: "c4",
    PAPER: "c5",
    LINEAR: "c2",
    PATH: "c0",
    ORACLE: "c1",
    ORACLE_FIXED: "c1",
}
OTHER_COLOUR = "c5"


def quality_section(figures: Figures) -> str:
    """Perplexity against active share: the checkpoint, its controls, other models, other numbers of experts."""
    quality = figures.quality
    picture = both(lambda width: _chart(figures, width))
    rows = [_row(p, p.name == quality.own, _meaning(p.name, figures)) for p in quality.controls]
    rows += [_row(p, False, "given with --compare") for p in quality.others]
    other = "fewer" if figures.overlap.overlaps else "more or fewer"
    head = ("", "perplexity", "ratio to dense", "FFN active", "oracle's picks")
    return (
        "<p>Lower is better. At one active share (one vertical line) compare the checkpoint with its controls; along a "
        f"line see what {other} active experts would give. Numbers at the line: routed experts per token, mean of "
        f"layers. The scale of perplexity is logarithmic.</p><figure>{picture}</figure>{table(head, rows)}"
        "<p class='soft'>Oracle's picks: the share of a token's picks in a layer that the oracle picks too, on the "
        f"inputs that the routing leads to.</p>{conditions(figures, _more_conditions(figures))}"
    )


def _meaning(name: str, figures: Figures) -> str:
    """What a control is; a model that was tuned to its own router may do better by that than by the oracle."""
    meaning = MEANINGS.get(name, "")
    if name != ORACLE:
        return meaning
    return (
        f"{meaning}: {'no bound, as the model was tuned to its router' if figures.model.fits_router else 'the bound'}"
    )


def _more_conditions(figures: Figures) -> str:
    dense = figures.conditions.dense
    words = f"Dense parent: {escape(dense)}." if dense else "Dense parent: this checkpoint with every expert on."
    if figures.model.selection == "threshold":
        words += " For other numbers of experts the thresholds were set anew on a sample of this text."
    if figures.overlap.overlaps:
        words += (
            " The lines end at the checkpoint's own number of experts: its experts overlap, so with more of them a "
            "neuron that two hold would be added twice."
        )
    if figures.quality.own not in {curve.name for curve in figures.quality.curves}:
        words += (
            " No line for the checkpoint's own router: one with --gate dselect is made for the number of experts it "
            "was trained to choose, and cannot choose another."
        )
    return words


def _chart(figures: Figures, width: int) -> str:
    quality, wide = figures.quality, width > 600
    points = [p for p in (*quality.controls, *quality.others) if isfinite(p.perplexity)]  # the table names them all
    values = [p.perplexity for p in points] + [y for curve in quality.curves for y in curve.perplexities if isfinite(y)]
    shares = [p.active_share for p in points] + [x for curve in quality.curves for x in curve.active_shares]
    x = linear_axis("share of the FFN that runs", min(shares), 1.0, lambda v: percent(v, 0), 5 if wide else 4)
    y = log_axis("perplexity", min(values), max(values), number_short)
    series = [_curve(curve, quality.own, tagged=index == 0) for index, curve in enumerate(quality.curves)]
    last = sorted(points, key=lambda p: p.name == quality.own)  # the checkpoint is drawn on top
    series += [_mark(p, COLOURS.get(p.name, OTHER_COLOUR), p.name == quality.own, wide) for p in last]
    return chart("perplexity against the share of the FFN that runs", series, x, y, width, 440 if wide else 380)


def _curve(curve: Curve, own: str, tagged: bool) -> Series:
    points = []
    for n, share, perplexity in zip(curve.num_active, curve.active_shares, curve.perplexities, strict=True):
        if not isfinite(perplexity):
            continue
        note = f"{curve.name}, {n:.3g} routed experts: {percent(share)} of the FFN, perplexity {number(perplexity)}"
        points.append(Point(share, perplexity, note, tag=f"{n:.2g}" if tagged else ""))
    return Series(COLOURS.get(curve.name, OTHER_COLOUR), tuple(points), "solid" if curve.name == own else "dashed")


def _mark(point: QualityPoint, colour: str, strong: bool, wide: bool) -> Series:
    note = f"{point.name}: {percent(point.active_share)} of the FFN, perplexity {number(point.perplexity)}"
    longest = 24 if wide else 20
    name = point.name if len(point.name) <= longest else f"{point.name[: longest - 1]}…"
    shown = f"{name} {number(point.perplexity)}" if wide else name
    return Series(colour, (Point(point.active_share, point.perplexity, note, shown),), strong=strong)


def _row(point: QualityPoint, own: bool, meaning: str) -> str:
    overlap = "" if point.mean_overlap is None else percent(point.mean_overlap)
    name = f"{escape(point.name)}{' (this checkpoint)' if own else ''}"
    cells = [f"{name}<br><span class='soft optional'>{escape(meaning)}</span>", number(point.perplexity)]
    return row([*cells, f"{point.ratio_to_dense:.3f}", percent(point.active_share), overlap], "own" if own else "")
