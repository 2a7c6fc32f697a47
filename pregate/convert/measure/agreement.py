"""Routing agreement: how often two routers of one model choose the same experts for the same token and layer.

Shape letters: T tokens (padding included), D hidden width, L layers, K active experts at most, R routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch

from pregate.convert.measure.controls import OraclePolicy
from pregate.model.gates import Choice
from pregate.model.layers import RoutedMLP, RoutingPolicy


@dataclass
class Tally:
    """Counts of (token, layer) pairs: all, those with equal sets, and the sum of the picks in common.

    Picks in common are 2 |A and B| / (|A| + |B|): with k experts each the share of k, and 1 for two empty sets.
    """

    num_pairs: int = 0
    num_equal: int = 0
    sum_overlap: float = 0.0

    def add(self, first_TK: torch.Tensor, second_TK: torch.Tensor) -> None:
        """Compare ids [T, K] with ids [T, K'] (ascending, -1 padding) token by token."""
        common_T = (first_TK[:, :, None] == second_TK[:, None, :]).logical_and(first_TK[:, :, None] >= 0).sum((1, 2))
        sizes_T = (first_TK >= 0).sum(1) + (second_TK >= 0).sum(1)
        self.num_pairs += common_T.shape[0]
        self.num_equal += int((2 * common_T == sizes_T).sum())
        self.sum_overlap += float(torch.where(sizes_T > 0, 2.0 * common_T / sizes_T.clamp_min(1), 1.0).double().sum())

    def figures(self) -> dict[str, float]:
        pairs = max(1, self.num_pairs)
        return {"same_set": round(self.num_equal / pairs, 4), "mean_overlap": round(self.sum_overlap / pairs, 4)}

    def __add__(self, other: Tally) -> Tally:
        pairs, equal = self.num_pairs + other.num_pairs, self.num_equal + other.num_equal
        return Tally(pairs, equal, self.sum_overlap + other.sum_overlap)


def layer_figures(tallies: Mapping[int, Tally]) -> dict[str, Any]:
    """Figures of all layers together, and of each in a list; `layers` says which those are."""
    each = {layer: tallies[layer].figures() for layer in sorted(tallies)}
    lists = {f"{name}_by_layer": [f[name] for f in each.values()] for name in ("same_set", "mean_overlap")}
    return sum(tallies.values(), Tally()).figures() | {"layers": list(each)} | lists


@dataclass
class AgreementMeter:
    """Collects what gate, path router and oracle choose on the hidden states of one run, and how much is active.

    All are asked about the states that the routing in use leads to. Layers without a choice (no routed expert
    active, or all of them) do not count towards agreement. With `fixed_number` the oracle takes that of each layer
    whatever the checkpoint's selection: to compare with a policy that does. Without `compares` only what is active is
    counted, which spares the oracle's work. `by_layer`: tallies of each layer by pair of names ("path_vs_gate").
    """

    by_layer: dict[int, dict[str, Tally]] = field(default_factory=dict)
    active_neurons: int = 0
    all_neurons: int = 0
    fixed_number: bool = False
    compares: bool = True

    @classmethod
    def resumed(cls, fields: dict[str, Any]) -> AgreementMeter:
        """A meter that goes on from `dataclasses.asdict` of another, by way of JSON or not (or from nothing: {})."""
        by_layer = {
            int(layer): {pair: Tally(**tally) for pair, tally in pairs.items()}
            for layer, pairs in fields.get("by_layer", {}).items()
        }
        return cls(by_layer, fields.get("active_neurons", 0), fields.get("all_neurons", 0))

    def add(self, layer: int, choices: dict[str, torch.Tensor], real_T: torch.Tensor) -> None:
        """Count what one layer's tokens would get by each name in `choices`, ids [T, K]; padding is left out."""
        here = self.by_layer.setdefault(layer, {})
        for (name, ids), (other, other_ids) in combinations(choices.items(), 2):
            here.setdefault(f"{name}_vs_{other}", Tally()).add(ids[real_T], other_ids[real_T])

    @property
    def tallies(self) -> dict[str, Tally]:
        """By pair of names, of all layers together."""
        pairs = dict.fromkeys(pair for pairs in self.by_layer.values() for pair in pairs)
        return {p: sum((pairs[p] for pairs in self.by_layer.values() if p in pairs), Tally()) for p in pairs}

    @property
    def forecast(self) -> dict[int, Tally]:
        """Path router against gate, layer by layer."""
        return {n: pairs["path_vs_gate"] for n, pairs in self.by_layer.items() if "path_vs_gate" in pairs}

    def count(self, mlp: RoutedMLP, ids_TK: torch.Tensor, real_T: torch.Tensor) -> None:
        """Count the neurons that the tokens of one layer run."""
        tokens, width = int(real_T.sum()), mlp.cut.expert_width
        self.active_neurons += tokens * mlp.cut.shared_width + int((ids_TK[real_T] >= 0).sum()) * width
        self.all_neurons += tokens * mlp.parent_width

    @property
    def active_share(self) -> float:
        """Share of the parent's FFN neurons that ran, over all tokens and layers measured."""
        return self.active_neurons / max(1, self.all_neurons)

    def figures(self) -> dict[str, dict[str, float]]:
        return {name: tally.figures() for name, tally in self.tallies.items()}


@dataclass
class RouteMeter(AgreementMeter):
    """An `AgreementMeter` that also keeps each token's experts: `visits` maps layer to bool [T, R] per batch."""

    visits: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def count(self, mlp: RoutedMLP, ids_TK: torch.Tensor, real_T: torch.Tensor) -> None:
        super().count(mlp, ids_TK, real_T)
        ids_TK, num_routed = ids_TK[real_T], mlp.cut.num_routed
        visits_TR = torch.zeros(len(ids_TK), num_routed + 1, dtype=torch.bool, device=ids_TK.device)
        visits_TR.scatter_(1, torch.where(ids_TK < 0, num_routed, ids_TK), True)  # padding goes to a column of its own
        if mlp.cut.num_active:
            self.visits.setdefault(mlp.layer, []).append(visits_TR[:, :-1].cpu().numpy())


class MeteredPolicy:
    """Routes as `inner` does and tells `meter` what each router would have chosen; lives for one forward pass.

    `paths_TLK` are the path router's choices for the same tokens, or None; `real_T` is False at padding (None: there
    is none). With a
    `control_name`, what `inner` chose is compared with them under that name.
    """

    def __init__(
        self,
        inner: RoutingPolicy,
        meter: AgreementMeter,
        real_T: torch.Tensor | None,
        paths_TLK: torch.Tensor | None,
        control_name: str | None = None,
    ) -> None:
        self._inner, self._meter, self._control_name = inner, meter, control_name
        self._real_T, self._paths_TLK = real_T, paths_TLK

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        chosen = self._inner.choose(mlp, x_TD)
        real_T = torch.ones(len(x_TD), dtype=torch.bool).to(x_TD.device) if self._real_T is None else self._real_T
        self._meter.count(mlp, chosen.ids, real_T)
        if self._meter.compares and 0 < mlp.cut.num_active < mlp.cut.num_routed:
            choices: dict[str, torch.Tensor] = {}
            if self._control_name is not None:
                choices[self._control_name] = chosen.ids
            if self._paths_TLK is not None:
                choices["path"] = self._paths_TLK[:, mlp.layer]
            choices["gate"] = mlp.gate.choose(x_TD).ids
            choices["oracle"] = OraclePolicy(self._meter.fixed_number).choose(mlp, x_TD).ids
            self._meter.add(mlp.layer, choices, real_T)
        return chosen
