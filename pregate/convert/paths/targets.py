"""What a path router learns from, per token along the layer-wise model: each expert's contribution mass, or, for a
forecast, what its gate ranks it by.

Shape letters: B documents of a batch, N tokens of one, T tokens (padding included), D hidden width, R routed
experts of a layer, S the experts of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from pregate.convert.progress import Progress
from pregate.convert.text.batches import batches, padded
from pregate.kernels.reference import above
from pregate.model.config import LayerCut
from pregate.model.gates import Choice, LinearGate
from pregate.model.layers import RoutedMLP, weighted_mass
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import split_layers

#: One document in this many is kept back from training to measure on.
HELD_BACK_EVERY = 20


@dataclass(frozen=True)
class TargetPool:
    """Documents and the masses seen on them: `rows[i]` ids, `mass[i]` float32 [len(rows[i]), S].

    With selection by threshold the experts to be chosen are those whose mass reaches their layer's of `limits`, and a
    router is to choose `mean_active` of each layer per token.
    """

    rows: list[list[int]]
    mass: list[torch.Tensor]
    limits: tuple[torch.Tensor, ...]
    mean_active: tuple[float, ...]

    def held_back(self) -> TargetPool:
        """The documents that are measured on."""
        return self._only(range(0, len(self.rows), HELD_BACK_EVERY))

    def training(self) -> TargetPool:
        """The others."""
        return self._only([i for i in range(len(self.rows)) if i % HELD_BACK_EVERY])

    def _only(self, kept: Sequence[int]) -> TargetPool:
        return replace(self, rows=[self.rows[i] for i in kept], mass=[self.mass[i] for i in kept])


class _Recorder:
    """Routes by the gate and keeps every layer's masses, or rankings; lives for one forward pass."""

    def __init__(self, of_gates: bool) -> None:
        self._of_gates = of_gates
        self._seen_TR: dict[int, torch.Tensor] = {}

    def side_by_side(self, cuts: Sequence[LayerCut], num_tokens: int) -> torch.Tensor:
        """What was seen of all layers side by side; a layer without routed experts has no column."""
        parts = [self._seen_TR.get(n, torch.zeros(num_tokens, cut.num_routed)) for n, cut in enumerate(cuts)]
        return torch.cat([p.cpu() for p in parts], dim=-1)

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        self._seen_TR[mlp.layer] = mlp.gate.ranking(x_TD) if self._of_gates else weighted_mass(mlp, x_TD)
        return mlp.gate.choose(x_TD)


def by_row(
    rows: Sequence[list[int]], progress: Progress, run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """Per document what `run` gives for its tokens [N, S], padding left out.

    `run` gets the ids and the mask [B, N] of a batch and gives [B * N, S], on the CPU.
    """
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    with progress.stage("collecting targets", len(rows)) as advance:
        for batch in batches(rows):
            ids_BN, mask_BN = padded([rows[i] for i in batch])
            found_BNS = run(ids_BN, mask_BN).unflatten(0, tuple(ids_BN.shape))
            for index, found_NS in zip(batch, found_BNS, strict=True):
                found[index] = found_NS[: len(rows[index])].clone()
            advance(len(batch))
    return found


@torch.no_grad()
def collect_targets(
    model: RoutedForCausalLM, rows: Sequence[list[int]], progress: Progress, of_gates: bool = False
) -> TargetPool:
    """Run the layer-wise model over `rows` and keep every routed expert's contribution mass at every token.

    `of_gates`: keep what the gates rank the experts by in its place, and how many they choose.
    """

    def masses(ids_BN: torch.Tensor, mask_BN: torch.Tensor) -> torch.Tensor:
        recorder = _Recorder(of_gates)
        for mlp in model.routed_mlps:
            mlp.policy = recorder  # set here and not by the model's forward, which would compute the head as well
        on_device = {"input_ids": ids_BN.to(model.device), "attention_mask": mask_BN.to(model.device)}
        model.parent.base_model(**on_device, use_cache=False)
        return recorder.side_by_side(model.config.cuts, ids_BN.numel())

    mass = by_row(rows, progress, masses)
    limits = tuple(_limit(model.routed_mlps, layer, of_gates) for layer in range(len(model.config.cuts)))
    numbers = tuple(float(c.num_active) for c in model.config.cuts)
    if of_gates and model.config.selection == "threshold":
        numbers = _numbers_above(torch.cat(mass), model.config.cuts, limits)
    return TargetPool(list(rows), mass, limits, numbers)


def _limit(mlps: Sequence[RoutedMLP], layer: int, of_gates: bool) -> torch.Tensor:
    mlp = next((m for m in mlps if m.layer == layer), None)
    if mlp is None or mlp.experts is None:
        return torch.tensor(torch.inf)
    limit = mlp.gate.threshold if of_gates and isinstance(mlp.gate, LinearGate) else mlp.mass_threshold
    return limit.detach().cpu()


def _numbers_above(
    mass_TS: torch.Tensor, cuts: Sequence[LayerCut], limits: Sequence[torch.Tensor]
) -> tuple[float, ...]:
    """Per layer the mean number of experts per token that reach its limit."""
    layers = zip(split_layers(mass_TS, cuts), limits, strict=True)
    return tuple(float((above(x, limit) >= 0).sum() / len(mass_TS)) for x, limit in layers)
