"""The sections on paths: which experts are used, and how the experts of a layer foretell those of the next."""

from __future__ import annotations

from collections.abc import Sequence

from pregate.convert.report.figures import Figures, Flow, LayerLoad
from pregate.convert.report.matrix import Cell, heat_map
from pregate.convert.report.parts import conditions, even_legend, even_shade, row, table
from pregate.convert.report.svg import Bar, bars, both
from pregate.convert.report.words import percent

#: At most so many pairs of layers have their flow drawn; of layers wider than `MANY_EXPERTS`, `FEW_FLOWS`.
MAX_FLOWS, FEW_FLOWS, MANY_EXPERTS = 6, 3, 32
#: The table of loads names at most so many layers, the most uneven.
MAX_ROWS = 8
LAYER_MEAN = "the layer's mean"


def load_section(figures: Figures) -> str:
    """Share of tokens that visit each expert of each layer."""
    loads = figures.loads
    rows = [(str(load.layer), _load_cells(load)) for load in loads]
    notes = [_load_note(load) for load in loads]
    picture = both(lambda w: heat_map("load of each expert", rows, w, "routed expert", "layer", row_notes=notes))
    worst = sorted(loads, key=lambda load: -load.max_over_mean)[:MAX_ROWS]
    head = (
        "layer, most uneven first",
        "busiest / mean",
        "worth of even experts",
        "experts per token",
        "tokens with none",
    )
    return (
        "<p>Each cell: the share of tokens that visit that expert (in per cent where it fits). Colour: how far that is "
        "from the mean of its layer. Shared experts, which every token runs, are not shown.</p>"
        f"<figure>{picture}{even_legend(LAYER_MEAN)}</figure>{table(head, [_load_row(w) for w in worst])}"
        "<p class='soft'>Worth of even experts: e to the power of the entropy of the visits; all experts where load is "
        "even, 1 where one takes everything. Tokens with none run the shared experts alone in that layer.</p>"
        f"{conditions(figures)}"
    )


def _load_cells(load: LayerLoad) -> list[Cell]:
    mean = sum(load.shares) / len(load.shares)
    cells = []
    for expert, share in enumerate(load.shares):
        times = share / mean if mean else 0.0
        note = f"layer {load.layer}, expert {expert}: {percent(share)} of tokens, {times:.2f} times the mean"
        cells.append(Cell(even_shade(share, mean), f"{100 * share:.0f}", note))
    return cells


def _load_note(load: LayerLoad) -> str:
    order = sorted(range(len(load.shares)), key=lambda e: -load.shares[e])
    top = ", ".join(f"{e} ({percent(load.shares[e])})" for e in order[:3])
    return f"layer {load.layer}: most visited {top}; least {order[-1]} ({percent(load.shares[order[-1]])})"


def _load_row(load: LayerLoad) -> str:
    even = f"{load.effective_experts:.1f} of {len(load.shares)}"
    cells = [str(load.layer), f"{load.max_over_mean:.2f}", even, f"{load.num_active:.2f}", percent(load.idle)]
    return row(cells)


def flow_section(figures: Figures) -> str:
    """How the experts of a layer foretell those of the next."""
    flows = figures.flows
    if not flows:
        return "<p>Only one layer has routed experts, so nothing flows between layers.</p>"
    rows = [Bar(f"{f.first} to {f.second}", f.relative, percent(f.relative), _flow_note(f)) for f in flows]
    high = max(0.05, *(bar.value for bar in rows)) * 1.02
    picture = both(lambda width: bars("how well a layer foretells the next", rows, width, high))
    drawn = sorted(flows, key=lambda f: -f.relative)[: _num_drawn(flows)]
    multiples = "".join(_flow_figure(f) for f in sorted(drawn, key=lambda f: f.first))
    which = "All pairs of neighbouring layers" if len(drawn) == len(flows) else f"The {len(drawn)} pairs that tell most"
    return (
        "<p>Bars: knowing one of the experts a token visits in a layer, how much less uncertain one of those in the "
        "next routed layer is (mutual information as a share of its entropy, less what shuffled tokens show). 0 %: "
        f"nothing; 100 %: everything. The bars end at {percent(high)}.</p><figure>{picture}</figure>"
        f"<h3>{which}</h3><p>Row: expert visited in the first layer. Column: expert visited in the second. In the "
        "cell, in per cent (where it fits): of the row's tokens, the share that goes on to the column. A row sums to "
        "100; of a token with several experts one is drawn in each layer. Colour: how far that is from the share of "
        f"all tokens that visit the column.</p><div class='multiples'>{multiples}</div>"
        f"{even_legend('the share of all tokens')}{conditions(figures)}"
    )


def _flow_note(flow: Flow) -> str:
    return f"layer {flow.first} to layer {flow.second}: {flow.information:.4f} of {flow.entropy:.4f} nats"


def _num_drawn(flows: Sequence[Flow]) -> int:
    return MAX_FLOWS if max(len(f.base) for f in flows) <= MANY_EXPERTS else FEW_FLOWS


def _flow_figure(flow: Flow) -> str:
    rows = [(str(i), _flow_cells(flow, i)) for i in range(len(flow.probabilities))]
    notes = [_flow_row_note(flow, i) for i in range(len(flow.probabilities))]
    many = len(flow.base) > 12
    width, height = (330, max(4, 290 // len(rows))) if many else (270, 26)
    what = f"from layer {flow.first} to layer {flow.second}"
    picture = heat_map(what, rows, width, f"expert of layer {flow.second}", "", height, notes)
    caption = f"layer {flow.first} (rows) to layer {flow.second} (columns)"
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _flow_cells(flow: Flow, i: int) -> list[Cell]:
    cells = []
    for j, (share, base) in enumerate(zip(flow.probabilities[i], flow.base, strict=True)):
        note = f"from expert {i} of layer {flow.first}, {percent(share)} go on to expert {j} of layer {flow.second}"
        cells.append(Cell(even_shade(share, base), f"{100 * share:.0f}", f"{note}; of all tokens {percent(base)}"))
    return cells


def _flow_row_note(flow: Flow, i: int) -> str:
    given = flow.probabilities[i]
    best = max(range(len(given)), key=lambda j: given[j] - flow.base[j])
    against = f"{percent(given[best])} against {percent(flow.base[best])} of all tokens"
    return f"expert {i} of layer {flow.first} leads most to expert {best} of layer {flow.second}: {against}"
