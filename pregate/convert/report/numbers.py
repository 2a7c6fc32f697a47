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
from pregate.kernels.reference import threshold_for
from pregate.model.config import LayerCut
from pregate.model.gates import Choice, RepresentativeGate
from pregate.model.layers import GatePolicy, RoutedMLP, RoutingPolicy, weighted_mass
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import PathRouter, split_layers

#: At most so many numbers of experts are tried, both ends included.
MAX_STEPS = 8
#: Tokens of the sample that thresholds are set on.
SAMPLE_TOKENS = 4096


@dataclass(frozen=True)
class Numbers:
    """Active routed experts of every layer, 0 in a dense one; `mean` over the layers that have routed experts."""

    by_layer: tuple[int, ...]
    mean: float

    @classmethod
    def of(cls, model: RoutedForCausalLM) -> Numbers:
        """The checkpoint's own."""
        return cls.make(model, [cut.num_active for cut in model.config.cuts])

    @classmethod
    def make(cls, model: RoutedForCausalLM, by_layer: Sequence[int]) -> Numbers:
        routed = [n for n, cut in zip(by_layer, model.config.cuts, strict=True) if cut.num_routed]
        return cls(tuple(by_layer), sum(routed) / len(routed))


def ladders(model: RoutedForCausalLM) -> list[Numbers]:
    """Numbers of experts from none to all, the checkpoint's own among them.

    With the same number in every layer each step is that number plus one (or more: at most `MAX_STEPS`); else
    steps are thirds of the way from the own number of each layer to none and to all. Where experts overlap there is
    none beyond the own: the neurons that two of a token's experts hold would run, and be added, once for each.
    """
    cuts = [c for c in model.config.cuts if c.num_routed]
    kinds = {(c.num_routed, c.num_active) for c in cuts}
    if len(kinds) == 1:
        ((num_routed, own),) = kinds
        stride = -(-num_routed // (MAX_STEPS - 2))
        steps = sorted({*range(0, num_routed, stride), own, num_routed})
        layers = [[n if c.num_routed else 0 for c in model.config.cuts] for n in steps]
    else:
        ways = [way / 3 for way in range(-3, 4)]
        layers = [[_part_way(cut, way) for cut in model.config.cuts] for way in ways]
    if any(overlaps(mlp.neuron_index.cpu().numpy()) for mlp in model.routed_mlps):
        layers = [n for n in layers if all(i <= cut.num_active for i, cut in zip(n, model.config.cuts, strict=True))]
    return list(dict.fromkeys(Numbers.make(model, n) for n in layers))


def _part_way(cut: LayerCut, way: float) -> int:
    """From none (-1) over the layer's own number (0) to all (1)."""
    end = cut.num_routed if way > 0 else 0
    return round(cut.num_active + (end - cut.num_active) * abs(way))


def routers_agree(model: RoutedForCausalLM, numbers: Numbers) -> bool:
    """Whether the checkpoint's own router and the oracle give the same.

    So they do where every layer runs none or all of its routed experts; but with all of them only if the router leaves
    them as they are: with a learned scale it weighs each by its score, and the oracle by 1.
    """
    ends = zip(numbers.by_layer, model.config.cuts, strict=True)
    return all(n == 0 or (n == cut.num_routed and not _weighs(model)) for n, cut in ends)


def _weighs(model: RoutedForCausalLM) -> bool:
    """Whether the routing in use weighs its experts by other than 1."""
    router = model.path_router
    if model.config.routing == "path" and router is not None:
        return router.config.weights == "learned" and bool(router.scale.any())
    gates = [mlp.gate for mlp in model.routed_mlps if mlp.cut.num_routed]
    return any(isinstance(gate, RepresentativeGate) and bool(gate.scale.any()) for gate in gates)


def takes_numbers(model: RoutedForCausalLM) -> bool:
    """Whether the routing in use can be given other numbers of experts.

    Not a path router with gate "dselect": its heads are made for the codes of as many experts as it was trained to
    choose (`dselect.code_shape`).
    """
    router = model.path_router
    return model.config.routing != "path" or router is None or router.config.gate != "dselect"


Limits = dict[int, float]


def thresholds_for(
    model: RoutedForCausalLM, rows: Sequence[list[int]], ladder: Sequence[Numbers], of_oracle: bool
) -> dict[Numbers, Limits]:
    """Thresholds of each layer by numbers of experts, of the oracle or of the checkpoint's own router.

    {} per numbers where a fixed number of experts is selected.
    """
    if model.config.selection != "threshold":
        return {numbers: {} for numbers in ladder}
    stride = max(1, round(sum(map(len, rows)) / SAMPLE_TOKENS))
    scores = _scores(model, rows[::stride], of_oracle)
    return {
        numbers: {layer: float(threshold_for(s_TR, numbers.by_layer[layer])) for layer, s_TR in scores.items()}
        for numbers in ladder
    }


@torch.no_grad()
def _scores(model: RoutedForCausalLM, rows: Sequence[list[int]], of_oracle: bool) -> dict[int, torch.Tensor]:
    """Scores [T, R] of each layer with routed experts, under the routing that goes by them."""
    if model.config.routing == "path" and not of_oracle:
        router = model.path_router
        assert router is not None
        all_TS = torch.cat([router(torch.tensor([row], device=model.device))[0][0] for row in rows])
        layers = enumerate(split_layers(all_TS, router.cuts))
        return {layer: scores_TR for layer, scores_TR in layers if scores_TR.shape[1]}
    keeper = _ScoreKeeper(of_oracle)
    for row in rows:  # one by one: no padding among the scores
        score_rows(model, [row], control=keeper)
    return {layer: torch.cat(parts) for layer, parts in keeper.scores.items()}


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
    if model.path_router is not None and model.config.routing == "path" and takes_numbers(model):
        changes.append((model, "path_router", _router_with(model.path_router, numbers, limits)))
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


def _router_with(router: PathRouter, numbers: Numbers, limits: Limits) -> PathRouter:
    """A copy of `router` that takes other numbers of experts."""
    cuts = [replace(cut, num_active=n) for cut, n in zip(router.cuts, numbers.by_layer, strict=True)]
    copy = PathRouter(router.config, router.embedding.num_embeddings, cuts, router.selection)
    copy.to(router.thresholds.device).load_state_dict(router.state_dict())
    for layer, limit in limits.items():
        copy.thresholds[layer] = limit
    return copy.requires_grad_(False)
