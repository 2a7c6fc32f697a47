"""The sections of a report's page: each one chart or table, one line how to read it, and the conditions of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pregate.convert.control_table import DENSE, LINEAR, ORACLE, ORACLE_FIXED, PAPER, PATH, RANDOM, STATIC
from pregate.convert.report_figures import Agreement, Curve, Figures, Flow, LayerLoad, QualityPoint
from pregate.convert.report_matrix import Cell, heat_map, shade
from pregate.convert.report_svg import Bar, Point, Series, bars, both, chart, linear_axis, log_axis
from pregate.convert.report_words import READ_ME_REPEATS, number, percent, size, total

#: What each control is, in words for somebody who meets it here first.
MEANINGS = {
    DENSE: "the model before the cut: everything runs",
    STATIC: "no routing: the strongest neurons of each layer, always the same ones",
    RANDOM: "each token gets experts at random",
    PAPER: "CMoE's gate: one neuron speaks for each expert",
    LINEAR: "a gate in each layer, which reads that layer's input as the model runs",
    PATH: "reads token ids alone and fixes all experts before the model runs",
    ORACLE: "the experts of greatest contribution, which nothing can know beforehand: the bound",
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
#: At most so many pairs of layers have their flow drawn; fewer where layers have many experts.
MAX_FLOWS = 6
EVEN_LIMITS = (0.05, 0.25, 1.0)


def quality_section(figures: Figures) -> str:
    """Perplexity against active share: the checkpoint, its controls, other models, other numbers of experts."""
    quality = figures.quality
    picture = both(lambda width: _quality_chart(figures, width))
    rows = [_quality_row(p, p.name == quality.own, MEANINGS.get(p.name, "")) for p in quality.controls]
    rows += [_quality_row(p, False, "compared with --compare") for p in quality.others]
    head = ("", "perplexity", "ratio to dense", "FFN active", "same experts as oracle")
    dense = figures.conditions.dense
    parent = f"Dense parent: {escape(dense)}." if dense else "Dense parent: this checkpoint with every expert on."
    again = ""
    if figures.model.selection == "threshold":
        again = " For other numbers of experts the thresholds were set anew on a sample of this text."
    return (
        "<p>Lower is better. At one active share (one vertical line) compare the checkpoint with its controls; along a line "
        "see what more or fewer active experts would give. Numbers at the line: routed experts per token, mean of layers. "
        f"The scale of perplexity is logarithmic.</p><figure>{picture}</figure>{_table(head, rows)}"
        "<p class='soft'>Same experts as oracle: the share of a token's picks in a layer that the oracle picks too, on the "
        f"inputs that routing leads to.</p>{conditions(figures, f'{parent}{again}')}"
    )


def _quality_chart(figures: Figures, width: int) -> str:
    quality, wide = figures.quality, width > 600
    values = [p.perplexity for p in (*quality.controls, *quality.others)]
    values += [y for curve in quality.curves for y in curve.perplexities]
    shares = [p.active_share for p in (*quality.controls, *quality.others)] + [
        x for curve in quality.curves for x in curve.active_shares
    ]
    x = linear_axis("share of the FFN that runs", min(shares), 1.0, lambda v: percent(v, 0), 5 if wide else 4)
    y = log_axis("perplexity", min(values), max(values), number_short)
    series = [_curve_series(curve, quality.own) for curve in quality.curves]
    points = sorted((*quality.controls, *quality.others), key=lambda p: p.name == quality.own)  # drawn last, on top
    series += [_named(p, COLOURS.get(p.name, "c5"), p.name == quality.own, wide) for p in points]
    return chart("perplexity against the share of the FFN that runs", series, x, y, width, 440 if wide else 380)


def number_short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}" if value >= 1 else f"{value:.2g}"


def _curve_series(curve: Curve, own: str) -> Series:
    points = []
    for n, share, perplexity in zip(curve.num_active, curve.active_shares, curve.perplexities, strict=True):
        note = f"{curve.name}, {n:g} routed experts: {percent(share)} of the FFN, perplexity {number(perplexity)}"
        points.append(Point(share, perplexity, note, tag=f"{n:.3g}" if curve.name == own else ""))
    return Series(COLOURS.get(curve.name, "c5"), tuple(points), "solid" if curve.name == own else "dashed")


def _named(point: QualityPoint, colour: str, strong: bool, wide: bool) -> Series:
    note = f"{point.name}: {percent(point.active_share)} of the FFN, perplexity {number(point.perplexity)}"
    name = point.name if len(point.name) <= 24 else f"{point.name[:23]}…"
    shown = f"{name} {number(point.perplexity)}" if wide else name[:20]
    return Series(colour, (Point(point.active_share, point.perplexity, note, shown),), strong=strong)


def _quality_row(point: QualityPoint, own: bool, meaning: str) -> str:
    overlap = "" if point.mean_overlap is None else percent(point.mean_overlap)
    name = f"{escape(point.name)}{' (this checkpoint)' if own else ''}<br><span class='soft'>{escape(meaning)}</span>"
    cells = [name, number(point.perplexity), f"{point.ratio_to_dense:.3f}", percent(point.active_share), overlap]
    return _row(cells, "own" if own else "")


def load_section(figures: Figures) -> str:
    """Share of tokens that visit each expert of each layer."""
    loads = figures.loads
    rows = [(str(load.layer), _load_cells(load)) for load in loads]
    notes = [_load_note(load) for load in loads]
    picture = both(lambda w: heat_map("load of each expert", rows, w, "routed expert", "layer", row_notes=notes))
    worst = sorted(loads, key=lambda load: -load.max_over_mean)[:8]
    head = (
        "layer, most uneven first",
        "busiest / mean",
        "worth of even experts",
        "experts per token",
        "tokens with none",
    )
    table = [
        _row(
            [
                str(w.layer),
                f"{w.max_over_mean:.2f}",
                f"{w.effective_experts:.1f} of {len(w.shares)}",
                f"{w.num_active:.2f}",
                percent(w.idle),
            ]
        )
        for w in worst
    ]
    return (
        "<p>Each cell: the share of tokens that visit that expert (in per cent where it fits). Colour: how far that is from "
        "the mean of its layer. Shared experts, which every token runs, are not shown.</p>"
        f"<figure>{picture}{_even_legend('its layer’s mean')}</figure>{_table(head, table)}"
        "<p class='soft'>Worth of even experts: exp of the entropy of the visits; all experts where load is even, 1 where one "
        f"takes everything. Tokens with none run the shared expert alone in that layer.</p>{conditions(figures)}"
    )


def _load_cells(load: LayerLoad) -> list[Cell]:
    mean = sum(load.shares) / len(load.shares)
    cells = []
    for expert, share in enumerate(load.shares):
        note = f"layer {load.layer}, expert {expert}: {percent(share)} of tokens, {share / mean if mean else 0:.2f} times the mean"
        cells.append(Cell(_even_shade(share, mean), f"{100 * share:.0f}", note))
    return cells


def _even_shade(share: float, even: float) -> str:
    """Colour of a share beside what would be even; the strongest "below" only for none at all."""
    if share == 0 and even:
        return "n3"
    return shade(max(share / even - 1, -0.99), EVEN_LIMITS) if even else "z"


def _even_legend(even: str) -> str:
    return _legend(
        ("n3", "none"), ("n2", f"over 25 % below {even}"), ("n1", "5 to 25 % below"), ("z", "within 5 %"),
        ("p1", "5 to 25 % above"), ("p2", "25 to 100 % above"), ("p3", "twice as much or more"),
    )  # fmt: skip


def _load_note(load: LayerLoad) -> str:
    order = sorted(range(len(load.shares)), key=lambda e: -load.shares[e])
    top = ", ".join(f"{e} ({percent(load.shares[e])})" for e in order[:3])
    last = order[-1]
    return f"layer {load.layer}: most visited {top}; least {last} ({percent(load.shares[last])})"


def flow_section(figures: Figures) -> str:
    """How the experts of a layer foretell those of the next."""
    flows = figures.flows
    if not flows:
        return "<p>Only one layer has routed experts, so nothing flows between layers.</p>"
    rows = [
        Bar(
            f"{f.first} to {f.second}",
            f.relative,
            percent(f.relative),
            f"layer {f.first} to layer {f.second}: {f.information:.4f} of {f.entropy:.4f} nats",
        )
        for f in flows
    ]
    high = max(0.05, *(row.value for row in rows)) * 1.02
    picture = both(lambda width: bars("how well a layer foretells the next", rows, width, high))
    most = max(flows, key=lambda f: f.relative)
    drawn = sorted(flows, key=lambda f: -f.relative)[: _num_drawn(flows)]
    multiples = "".join(_flow_figure(f) for f in sorted(drawn, key=lambda f: f.first))
    which = "All pairs of neighbouring layers" if len(drawn) == len(flows) else f"The {len(drawn)} pairs that tell most"
    return (
        "<p>Bars: knowing one of the experts a token visits in a layer, how much less uncertain one of those in the next routed "
        "layer is (mutual information as a share of its entropy, less what chance shows). 0 %: nothing; 100 %: everything. "
        f"The bars end at {percent(high)}."
        f"</p><figure>{picture}</figure><p>Layer {most.first} tells most of the next, layer {most.second}: "
        f"{percent(most.relative)} ({most.information:.3f} of {most.entropy:.3f} nats).</p>"
        f"<h3>{which}</h3><p>Row: expert visited in the first layer. Column: expert visited in the second. In the cell, in per "
        "cent: of the row's tokens, the share that goes on to the column (a row sums to 100; of a token with several experts one "
        "is drawn in each layer). Colour: how far that is from the share of all tokens that visit the column.</p>"
        f"<div class='multiples'>{multiples}</div>{_even_legend('the share of all tokens')}{conditions(figures)}"
    )


def _num_drawn(flows: Sequence[Flow]) -> int:
    widest = max(len(f.base) for f in flows)
    return MAX_FLOWS if widest <= 32 else 3


def _flow_figure(flow: Flow) -> str:
    rows, notes = [], []
    for i, given in enumerate(flow.probabilities):
        cells = []
        for j, share in enumerate(given):
            note = f"from expert {i} of layer {flow.first} {percent(share)} go on to expert {j} of layer {flow.second}; of all {percent(flow.base[j])}"
            cells.append(Cell(_even_shade(share, flow.base[j]), f"{100 * share:.0f}", note))
        best = max(range(len(given)), key=lambda j: given[j] - flow.base[j])
        notes.append(
            f"expert {i} of layer {flow.first}: most above the rest at expert {best} of layer {flow.second}, {percent(given[best])} against {percent(flow.base[best])}"
        )
        rows.append((str(i), cells))
    many = len(flow.base) > 12
    width = 270 if not many else 330
    picture = heat_map(
        f"from layer {flow.first} to layer {flow.second}",
        rows, width, f"expert of layer {flow.second}", "", cell_height=26 if not many else max(4, 290 // len(rows)), row_notes=notes,
    )  # fmt: skip
    return (
        f"<figure>{picture}<figcaption>layer {flow.first} (rows) to layer {flow.second} (columns)</figcaption></figure>"
    )


def agreement_section(figures: Figures) -> str:
    """How often path, gate and oracle choose alike, by layer."""
    if not figures.agreements:
        return "<p>No layer leaves a choice (all or none of its routed experts are active), so there is nothing to compare.</p>"
    pairs = sorted({(a.first, a.second) for a in figures.agreements}, key=lambda p: _PAIR_ORDER.index(p))
    lines = [(pair, [a for a in figures.agreements if (a.first, a.second) == pair]) for pair in pairs]
    picture = both(lambda width: _agreement_chart(figures, lines, width))
    rows = [_agreement_row(pair, layers) for pair, layers in lines]
    path = "" if any("path" in p for p in pairs) else " This checkpoint has no path router."
    return (
        f"<p>Higher is better. For each layer: the share of picks in common, a token at a time.{path} All are asked about the "
        "hidden states that this checkpoint's own routing leads to.</p>"
        f"<figure>{picture}</figure>{_table(('', 'picks in common', 'lowest layer', 'all picks equal'), rows)}{conditions(figures)}"
    )


_PAIR_ORDER = [("path", "oracle"), ("gate", "oracle"), ("path", "gate")]
_PAIR_COLOURS = {("path", "oracle"): "c0", ("gate", "oracle"): "c2", ("path", "gate"): "c3"}


def _agreement_chart(figures: Figures, lines: Sequence[tuple[tuple[str, str], list[Agreement]]], width: int) -> str:
    random = figures.quality.point(RANDOM)
    chance = random.mean_overlap if random is not None else None
    layers = [a.layer for a in figures.agreements]
    lows = [a.mean_overlap for a in figures.agreements] + ([chance] if chance is not None else [])
    wide = width > 600
    x = linear_axis("layer", min(layers), max(layers), lambda v: f"{v:.0f}", min(9, max(layers) - min(layers) + 1))
    y = linear_axis("picks in common", min(lows), 1.0, lambda v: percent(v, 0), 5)
    series = []
    if chance is not None:
        ends = (
            Point(min(layers), chance, "random routing"),
            Point(max(layers), chance, "random routing", "random experts"),
        )
        series.append(Series("c4", ends, "dashed", marks=False))
    for pair, agreements in lines:
        points = [
            Point(
                a.layer,
                a.mean_overlap,
                f"layer {a.layer}, {' and '.join(pair)}: {percent(a.mean_overlap)} of picks, {percent(a.same_set)} whole sets",
            )
            for a in agreements
        ]
        last = points[-1]
        points[-1] = Point(last.x, last.y, last.note, " and ".join(pair))
        series.append(Series(_PAIR_COLOURS[pair], tuple(points), "solid"))
    return chart("picks in common by layer", series, x, y, width, 300 if wide else 260)


def _agreement_row(pair: tuple[str, str], layers: Sequence[Agreement]) -> str:
    mean = sum(a.mean_overlap for a in layers) / len(layers)
    same = sum(a.same_set for a in layers) / len(layers)
    worst = min(layers, key=lambda a: a.mean_overlap)
    lowest = f"{percent(worst.mean_overlap)} (layer {worst.layer})"
    return _row([escape(" and ".join(pair)), percent(mean), lowest, percent(same)])


def repeats_section(figures: Figures) -> str:
    """How often a token keeps its predecessor's path, and what it brings in anew."""
    repeats, overlap = figures.repeats, figures.overlap
    rows = [
        Bar(
            f"layer {r.layer}",
            r.same_set,
            f"{percent(r.same_set)}",
            f"layer {r.layer}: {percent(r.same_set)} of tokens keep all their predecessor's experts, {percent(r.same_by_chance)} "
            f"by chance; {r.num_sets} different sets seen",
            r.same_by_chance,
        )
        for r in repeats.layers
    ]
    high = max(0.05, *(max(r.same_set, r.same_by_chance) for r in repeats.layers)) * 1.05
    picture = both(lambda width: bars("tokens that keep their predecessor's experts", rows, width, high))
    new, whole = total(repeats.layers, "new_experts"), total(repeats.layers, "num_experts")
    new_bytes, row_bytes = total(repeats.layers, "new_bytes"), total(repeats.layers, "new_row_bytes")
    if not overlap.overlaps:
        rows_word = "No two experts hold the same neuron, so a swap moves whole experts."
    elif not overlap.tied:
        rows_word = "Experts hold the same neurons, but their weights differ by now, so a swap moves whole experts."
    else:
        saved = 1 - row_bytes / new_bytes if new_bytes else 0.0
        rows_word = (
            f"Experts overlap ({overlap.rows_per_neuron:.2f} rows stored for each neuron): a swap that moved only the rows the "
            f"predecessor's experts lack would move {size(row_bytes)} a token and save {percent(saved)} of those bytes."
        )
    return (
        f"<p>A token keeps its predecessor's whole path in <strong>{percent(repeats.same_path)}</strong> of {repeats.num_pairs:,} cases; "
        f"two tokens drawn at random share one in {percent(repeats.same_by_chance)}. {repeats.num_paths:,} different paths were "
        f"seen over {repeats.num_tokens:,} tokens, the commonest at {percent(repeats.commonest_path)}. Read-ME reports "
        f"{percent(READ_ME_REPEATS, 0)} for its own model, which has one index for all layers and one active expert.</p>"
        "<p>By layer: how often a token's set of experts is its predecessor's. Upright tick: two tokens drawn at random.</p>"
        f"<figure>{picture}</figure>"
        f"<p>A token visits {whole:.1f} routed experts over all layers, {new:.1f} of which its predecessor did not: "
        f"{size(new_bytes)} to fetch for each token of one sequence if only the last token's experts are at hand. {rows_word}</p>"
        f"{conditions(figures)}"
    )


def training_section(figures: Figures) -> str:
    """Curves of a training, where the checkpoint keeps them."""
    parts = []
    for curve in figures.training:
        parts.append(
            f"<h3>{escape(_CURVE_NAMES.get(curve.name, curve.name))}</h3><figure>{both(_curve_drawer(curve.steps, curve.values, curve.name))}</figure>"
        )
    if not parts:
        parts.append(
            "<p>No training curve: the folder has no <code>training.jsonl</code>, which <code>pregate tune</code> writes. "
            "No weight was tuned by a run that kept one.</p>"
        )
    losses = figures.router_losses
    if losses:
        words = ", ".join(
            f"{number(losses[n])} {w}"
            for n, w in (("loss_first", "at the first step"), ("loss_last", "over the last 5 % of steps"))
            if n in losses
        )
        parts.append(f"<p>Path router, training loss: {words} (from the manifest; on the text it was trained on).</p>")
    return "".join(parts)


_CURVE_NAMES = {
    "loss": "Loss", "cross_entropy": "Cross entropy, nats per token", "kl": "Divergence from the teacher, nats per token",
    "validation_perplexity": "Perplexity on held-back text", "active_share": "Share of the FFN that runs", "learning_rate": "Learning rate",
}  # fmt: skip


def _curve_drawer(steps: Sequence[float], values: Sequence[float], name: str):
    def draw(width: int) -> str:
        x = linear_axis("step", min(steps), max(steps), lambda v: f"{v:,.0f}")
        y = linear_axis("", min(values), max(values), lambda v: f"{v:g}", 4)
        points = [Point(s, v, f"step {s:,.0f}: {number(v)}") for s, v in zip(steps, values, strict=True)]
        last = points[-1]
        points[-1] = Point(last.x, last.y, last.note, number(last.y))
        return chart(name, [Series("c0", tuple(points), "solid", marks=len(points) < 40)], x, y, width, 190)

    return draw


def conditions(figures: Figures, more: str = "") -> str:
    """The line under each section: text, tokens, seed, date. `more` is markup."""
    c = figures.conditions
    files = ", ".join(escape(path.rsplit("/", 1)[-1]) for path in c.text)
    sentence = (
        f"Measured on {c.num_tokens:,} tokens of {c.num_documents:,} documents of {files}, each cut to {c.context_tokens:,} "
        f"tokens, begin-of-text given and not scored; seed {c.seed}; {escape(c.date)}."
    )
    return f"<p class='conditions'>{sentence}{' ' + more if more else ''}</p>"


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th scope='col'>{escape(word)}</th>" for word in head)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(cells: Sequence[str], cls: str = "") -> str:
    """One table row of markup cells."""
    mark = f" class='{cls}'" if cls else ""
    return f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _legend(*keys: tuple[str, str]) -> str:
    return (
        "<div class='legend'>" + "".join(f"<span><i class='key {c}'></i>{escape(w)}</span>" for c, w in keys) + "</div>"
    )
