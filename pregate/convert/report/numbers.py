"""A checkpoint with another number of active experts, for as long as it is measured so.

Selection by threshold: a router's threshold of each layer is set anew so that its mean number of experts on a sample of
the report's text is the one wanted; what it comes to on all of the text is measured.

Shape letters: T tokens, R routed experts, S routed experts of all layers side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from pregate.convert.measure.controls import OraclePolicy
from pregate.convert.measure.overlap import overlaps
from pregate.convert.measure.scoring import score_rows
from pregate.convert.progress import QUIET, Progress
from pregate.kernels.reference import threshold_for
from pregate.model.gates import Choice
from pregate.model.layers import GatePolicy, RoutedMLP, RoutingPolicy, weighted_mass
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import split_layers

#: At most so many numbers of experts are tried, both ends included.
MAX_STEPS = 8
#: Tokens of the sample that thresholds are set on.
SAMPLE_TOKENS = 4096

Limits = dict[int, float]


@dataclass(frozen=True)
class Numbers:
    """Active routed experts of every layer, 0 in a dense one; `mean` over the layers that have routed experts."""

    by_layer: tuple[int, ...]
    mean: float

    @classmethod
    def of(cls, model: RoutedForCausalLM, by_layer: Sequence[int] | None = None) -> Numbers:
        """`by_layer`, or the checkpoint's own."""
        cuts = model.config.cuts
        numbers = tuple(cut.num_active for cut in cuts) if by_layer is None else tuple(by_layer)
        routed = [n for n, cut in zip(numbers, cuts, strict=True) if cut.num_routed]
        return cls(numbers, sum(routed) / len(routed))


def ladders(model: RoutedForCausalLM) -> list[Numbers]:
    """Numbers of experts from none to all, the checkpoint's own among them.

    With the same number in every layer each step is that number plus one (or more: at most `MAX_STEPS`); else
    steps are thirds of the way from the own number of each layer to none and to all. Where experts overlap there is
    none beyond the own: the neurons that two of a token's experts hold would run, and be added, once for each.
    """
    cuts = model.config.cuts
    kinds = {(c.num_routed, c.num_active) for c in cuts if c.num_routed}
    if len(kinds) == 1:
        ((num_routed, own),) = kinds
        steps = sorted({*range(0, num_routed, -(-num_routed // (MAX_STEPS - 2))), own, num_routed})
        layers = [[n if c.num_routed else 0 for c in cuts] for n in steps]
    else:
        thirds = range(-3, 4)
        layers = [
            [c.num_active + round((c.num_routed * (way > 0) - c.num_active) * abs(way) / 3) for c in cuts]
            for way in thirds
        ]
    if any(overlaps(mlp.neuron_index.cpu().numpy()) for mlp in model.routed_mlps):
        layers = [n for n in layers if all(i <= cut.num_active for i, cut in zip(n, cuts, strict=True))]
    return list(dict.fromkeys(Numbers.of(model, n) for n in layers))


def takes_numbers(model: RoutedForCausalLM) -> bool:
    """Whether the routing in use can be given other numbers of experts.

    Not a path router with gate "dselect": its heads are made for the codes of as many experts as it was trained to
    choose (`dselect.code_shape`).
    """
    return model.deciding_router is None or model.deciding_router.config.gate != "dselect"


@torch.no_grad()
def thresholds_for(
    model: RoutedForCausalLM,
    rows: Sequence[list[int]],
    ladder: Sequence[Numbers],
    of_oracle: bool,
    progress: Progress = QUIET,
) -> dict[Numbers, Limits]:
    """Thresholds of each layer by numbers of experts, of the oracle or of the checkpoint's own router.

    {} per numbers where a fixed number of experts is selected.
    """
    if model.config.selection != "threshold":
        return {numbers: {} for numbers in ladder}
    rows, router = rows[:: max(1, round(sum(map(len, rows)) / SAMPLE_TOKENS))], model.deciding_router
    if router is not None and not of_oracle:
        all_TS = torch.cat([router(torch.tensor([row], device=model.device))[0][0] for row in rows])
        scores = dict(enumerate(split_layers(all_TS, router.cuts)))
    else:
        keeper = _ScoreKeeper(of_oracle)
        with progress.stage("finding thresholds", len(rows)) as advance:
            for row in rows:  # one by one: no padding among the scores
                score_rows(model, [row], control=keeper)
                advance(1)
        scores = {layer: torch.cat(parts) for layer, parts in keeper.scores.items()}
    scores = {layer: scores_TR for layer, scores_TR in scores.items() if scores_TR.shape[1]}
    return {
        numbers: {layer: float(threshold_for(s_TR, numbers.by_layer[layer])) for layer, s_TR in scores.items()}
        for numbers in ladder
    }


class _ScoreKeeper:
    """Routes as the oracle or the layer's gate and keeps the scores it goes by."""

    def __init__(self, of_oracle: bool) -> None:
        self.scores: dict[int, list[torch.Tensor]] = {}
        self._of_oracle = of_oracle
        self._inner: RoutingPolicy = OraclePolicy() if of_oracle else GatePolicy()

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        scores_TR = weighted_mass(mlp, x_TD) if self._of_oracle else mlp.gate(x_TD)
        self.scores.setdefault(mlp.layer, []).append(scores_TR)
        return self._inner.choose(mlp, x_TD)


@contextmanager
def with_numbers(model: RoutedForCausalLM, numbers: Numbers, limits: Limits) -> Iterator[None]:
    """Within the block `numbers` of experts are active, by the thresholds `limits` where thresholds choose.

    Gates, oracle and path router (where it can: `takes_numbers`) all follow; all is as before afterwards.
    """
    changes: list[tuple[Any, str, Any]] = []
    for mlp in model.routed_mlps:
        number, limit = numbers.by_layer[mlp.layer], limits.get(mlp.layer)
        changes.append((mlp, "cut", replace(mlp.cut, num_active=number)))
        changes += [(gate, "num_active", number) for gate in (mlp.linear_gate, mlp.paper_gate) if gate is not None]
        if limit is not None:
            changes.append((mlp, "mass_threshold", torch.full_like(mlp.mass_threshold, limit)))
            if mlp.linear_gate is not None:
                changes.append((mlp.linear_gate, "threshold", torch.full_like(mlp.linear_gate.threshold, limit)))
    router = model.deciding_router
    if router is not None and takes_numbers(model):
        cuts = [replace(cut, num_active=n) for cut, n in zip(router.cuts, numbers.by_layer, strict=True)]
        thresholds = router.thresholds.clone()
        for layer, limit in limits.items():
            thresholds[layer] = limit
        changes += [(router, "cuts", tuple(cuts)), (router, "thresholds", thresholds), (router, "share_control", None)]
    if (network := model.read_network) is not None:
        first = network.config.layer
        cuts = [replace(cut, num_active=n) for cut, n in zip(network.cuts, numbers.by_layer[first:], strict=True)]
        thresholds = network.thresholds.clone()
        for layer, limit in limits.items():
            if layer >= first:
                thresholds[layer - first] = limit
        changes += [(network, "cuts", tuple(cuts)), (network, "thresholds", thresholds)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        _set(model, changes)
        yield
    finally:
        _set(model, before)


def _set(model: RoutedForCausalLM, changes: Sequence[tuple[Any, str, Any]]) -> None:
    for owner, name, value in changes:
        setattr(owner, name, value)
    model.forget_path_computer()
