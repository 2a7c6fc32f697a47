"""The section on repeats: does a token keep its predecessor's path, and what does it bring in anew."""

from __future__ import annotations

from pregate.convert.report.figures import Figures, LayerRepeats
from pregate.convert.report.parts import conditions
from pregate.convert.report.svg import Bar, bars, both
from pregate.convert.report.words import READ_ME_REPEATS, percent, size, total


def repeats_section(figures: Figures) -> str:
    """How often a token keeps its predecessor's path, and what it brings in anew."""
    layers = figures.repeats.layers
    rows = [Bar(f"layer {r.layer}", r.same_set, percent(r.same_set), _note(r), r.same_by_chance) for r in layers]
    high = max(0.05, *(max(r.same_set, r.same_by_chance) for r in layers)) * 1.05
    picture = both(lambda width: bars("tokens that keep their predecessor's experts", rows, width, high))
    return (
        f"<p>{_whole_paths(figures)}</p><p>By layer: how often a token's set of experts is its predecessor's. Upright "
        f"tick: two tokens drawn at random. The bars end at {percent(high)}.</p><figure>{picture}</figure>"
        f"<p>{_traffic(figures)} {_rows_moved(figures)}</p>{conditions(figures)}"
    )


def _note(layer: LayerRepeats) -> str:
    kept = f"layer {layer.layer}: {percent(layer.same_set)} of tokens keep all their predecessor's experts"
    return f"{kept}, {percent(layer.same_by_chance)} by chance; {layer.num_sets} different sets seen"


def _whole_paths(figures: Figures) -> str:
    r = figures.repeats
    return (
        f"A token keeps its predecessor's whole path in <strong>{percent(r.same_path)}</strong> of {r.num_pairs:,} "
        f"cases; two tokens drawn at random share one in {percent(r.same_by_chance)}. {r.num_paths:,} different paths "
        f"were seen over {r.num_tokens:,} tokens, the commonest at {percent(r.commonest_path)}. Read-ME reports "
        f"{percent(READ_ME_REPEATS, 0)} for its own model, which has one index for all layers and one active expert."
    )


def _traffic(figures: Figures) -> str:
    layers = figures.repeats.layers
    new, visited = total(layers, "new_experts"), total(layers, "num_experts")
    return (
        f"A token visits {visited:.1f} routed experts over all layers, {new:.1f} of which its predecessor did not: "
        f"{size(total(layers, 'new_bytes'))} to fetch for each token of one sequence if only the last token's experts "
        "are at hand."
    )


def _rows_moved(figures: Figures) -> str:
    """What a swap that moved only the differing rows would save (Read-ME's experts overlap)."""
    overlap, layers = figures.overlap, figures.repeats.layers
    whole, rows = total(layers, "new_bytes"), total(layers, "new_row_bytes")
    if not overlap.overlaps:
        return "No two experts hold the same neuron, so there is no overlap: a swap moves whole experts."
    if not overlap.tied:
        return "Experts hold the same neurons, but their weights differ by now, so a swap moves whole experts."
    saved = 1 - rows / whole if whole else 0.0
    return (
        f"Experts overlap ({overlap.rows_per_neuron:.2f} rows stored for each neuron): a swap that moved only the rows "
        f"the predecessor's experts lack would move {size(rows)} a token and save {size(whole - rows)} "
        f"({percent(saved)})."
    )
