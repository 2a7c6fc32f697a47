"""Measuring a checkpoint for its report: who visits what, and what each routing or another number of experts costs.

Data on its way: rows of ids -> scoring runs (`score_rows`) with a meter that keeps every token's experts -> figures.

Shape letters: T tokens, R routed experts, K experts of a token at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pregate.convert.measure.agreement import AgreementMeter, RouteMeter
from pregate.convert.measure.control_table import ORACLE, control_rows, num_controls, own_name
from pregate.convert.measure.controls import OraclePolicy
from pregate.convert.measure.overlap import overlaps, rows_are_tied
from pregate.convert.measure.scoring import score_rows
from pregate.convert.progress import Progress
from pregate.convert.report.figures import Agreement, Curve, LayerLoad, Overlap, Quality, QualityPoint, Repeats
from pregate.convert.report.numbers import Numbers, ladders, takes_numbers, thresholds_for, with_numbers
from pregate.convert.report.routes import layer_load, repeats
from pregate.convert.text.batches import batches
from pregate.model.layers import RoutingPolicy
from pregate.model.modeling import RoutedForCausalLM


@dataclass(frozen=True)
class Routes:
    """What one run with the checkpoint's own routing showed. `visits`: layer -> bool [T, R]; `starts` [T]."""

    visits: dict[int, np.ndarray]
    starts: np.ndarray
    agreements: tuple[Agreement, ...]

    def loads(self) -> tuple[LayerLoad, ...]:
        return tuple(layer_load(layer, visits_TR) for layer, visits_TR in self.visits.items())

    def repeats(self, model: RoutedForCausalLM, row_bytes: int) -> Repeats:
        """Repeats along the text; `row_bytes` are a neuron's as stored."""
        neurons = {mlp.layer: mlp.routed_neurons.cpu().numpy() for mlp in model.routed_mlps}
        return repeats(self.visits, self.starts, row_bytes, neurons)


def measure_routes(model: RoutedForCausalLM, rows: Sequence[list[int]], progress: Progress) -> Routes:
    """Run `rows` by the checkpoint's own routing and keep every token's experts, in the order they were scored."""
    meter = RouteMeter()
    score_rows(model, rows, meter, progress, name="who visits what")
    lengths = [len(rows[i]) for batch in batches(rows) for i in batch]
    starts_T = np.zeros(sum(lengths), dtype=bool)
    starts_T[np.cumsum([0, *lengths[:-1]])] = True
    agreements = tuple(
        Agreement(layer, *pair.split("_vs_", 1), **tally.figures())  # pyright: ignore[reportArgumentType]
        for layer, pairs in sorted(meter.by_layer.items())
        for pair, tally in pairs.items()
    )
    visits = {layer: np.concatenate(parts) for layer, parts in sorted(meter.visits.items())}
    return Routes(visits, starts_T, agreements)


def measure_quality(
    model: RoutedForCausalLM, rows: Sequence[list[int]], num_bytes: int, parent: Any, seed: int, progress: Progress
) -> Quality:
    """The checkpoint beside its controls (`control_rows`), and at other numbers of active experts: its own router and
    the oracle from no routed expert to all of them, or as far as `ladders` goes.

    The oracle alone where the router cannot be given other numbers. What the table holds already is not run again.
    """
    table = control_rows(model, rows, num_bytes, parent, seed, progress)
    points = tuple(QualityPoint(name, **figures) for name, figures in table.items())
    ladder, curves = ladders(model), []
    for name, policy in _with_numbers(model).items():
        limits, shares, perplexities = thresholds_for(model, rows, ladder, name == ORACLE, progress), [], []
        for step in ladder:
            if step == Numbers.of(model):
                share, perplexity = table[name]["active_share"], table[name]["perplexity"]
            else:
                meter = AgreementMeter(compares=False)
                with with_numbers(model, step, limits[step]):
                    named = f"{name}, {step.mean:g} active"
                    score = score_rows(model, rows, meter, progress, policy, named)
                share, perplexity = round(meter.active_share, 4), round(score.perplexity, 4)
            shares.append(share)
            perplexities.append(perplexity)
        curves.append(Curve(name, tuple(step.mean for step in ladder), tuple(shares), tuple(perplexities)))
    return Quality(own_name(model), points, curves=tuple(curves))


def _with_numbers(model: RoutedForCausalLM) -> dict[str, RoutingPolicy | None]:
    """Who routes by other numbers of experts than the checkpoint's; None: its own router."""
    own: dict[str, RoutingPolicy | None] = {own_name(model): None} if takes_numbers(model) else {}
    return own | {ORACLE: OraclePolicy()}


def num_runs(model: RoutedForCausalLM, num_compared: int) -> int:
    """How often `measure_quality`, `measure_routes` and `compared`, so often, read the text."""
    others = sum(step != Numbers.of(model) for step in ladders(model))
    return num_controls(model) + len(_with_numbers(model)) * others + 1 + num_compared


def compared(
    name: str, model: Any, rows: Sequence[list[int]], num_bytes: int, dense: QualityPoint, progress: Progress
) -> QualityPoint:
    """Another model, dense or routed, on the same rows."""
    meter = AgreementMeter(compares=False) if isinstance(model, RoutedForCausalLM) else None
    score = score_rows(model, rows, meter, progress, name=name)
    share = 1.0 if meter is None else round(meter.active_share, 4)
    ratio = round(score.perplexity / dense.perplexity, 4)
    return QualityPoint(name, share, round(score.perplexity, 4), ratio, round(score.bits_per_byte(num_bytes), 4))


def measure_overlap(model: RoutedForCausalLM) -> Overlap:
    """Whether experts hold the same parent neurons, and whether the weights of those rows are still equal."""
    rows = [mlp.neuron_index.cpu().numpy() for mlp in model.routed_mlps]
    num_neurons = sum(len(np.unique(index)) for index in rows)
    tied = all(map(rows_are_tied, model.routed_mlps))
    return Overlap(any(map(overlaps, rows)), tied, sum(map(len, rows)) / max(1, num_neurons))
