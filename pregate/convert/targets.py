"""What a path router learns from: each expert's contribution mass along the layer-wise model, per token.

Shape letters: T tokens (padding included), D hidden width, R routed experts of a layer, S the experts of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pregate.convert.progress import Progress
from pregate.convert.scoring import batches, padded
from pregate.model.config import LayerCut
from pregate.model.gates import Choice
from pregate.model.layers import RoutedMLP, weighted_mass
from pregate.model.modeling import RoutedForCausalLM


@dataclass(frozen=True)
class TargetPool:
    """Documents and the contribution masses seen on them: `rows[i]` ids, `mass[i]` float32 [len(rows[i]), S]."""

    rows: list[list[int]]
    mass: list[torch.Tensor]


class _MassRecorder:
    """Routes by the gate and keeps every layer's masses; lives for one forward pass."""

    def __init__(self) -> None:
        self._mass_TR: dict[int, torch.Tensor] = {}

    def side_by_side(self, cuts: Sequence[LayerCut], num_tokens: int) -> torch.Tensor:
        """The masses of all layers side by side; a layer without routed experts has no column."""
        parts = [self._mass_TR.get(n, torch.zeros(num_tokens, cut.num_routed)) for n, cut in enumerate(cuts)]
        return torch.cat([p.cpu() for p in parts], dim=-1)

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        self._mass_TR[mlp.layer] = weighted_mass(mlp, x_TD)
        return mlp.gate.choose(x_TD)


@torch.no_grad()
def collect_targets(model: RoutedForCausalLM, rows: Sequence[list[int]], progress: Progress) -> TargetPool:
    """Run the layer-wise model over `rows` and keep every routed expert's contribution mass at every token."""
    mass: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    with progress.stage("collecting targets", len(rows)) as advance:
        for batch in batches(rows):
            ids_BN, mask_BN = (t.to(model.device) for t in padded([rows[i] for i in batch]))
            recorder = _MassRecorder()
            for mlp in model.routed_mlps:
                mlp.policy = recorder  # set here and not by the model's forward, which would compute the head as well
            model.parent.base_model(input_ids=ids_BN, attention_mask=mask_BN, use_cache=False)
            mass_BNS = recorder.side_by_side(model.config.cuts, ids_BN.numel()).unflatten(0, tuple(ids_BN.shape))
            for index, mass_NS in zip(batch, mass_BNS, strict=True):
                mass[index] = mass_NS[: len(rows[index])].clone()
            advance(len(batch))
    return TargetPool(list(rows), mass)
