"""Training a path router: regression of every layer's contribution masses from token ids alone.

The masses are standardised within their layer, then centred within each token and layer: only the order of a
layer's experts decides, and a common rise of all of them is nothing the router has to learn.

Shape letters: B documents of a batch, N tokens, S the routed experts of all layers side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pregate.convert.agreement import Tally
from pregate.convert.evaluate import batches, padded
from pregate.convert.progress import Progress
from pregate.convert.targets import TargetPool
from pregate.kernels.reference import top_k
from pregate.model.config import LayerCut
from pregate.model.path_router import PathRouter


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how fast a path router is trained; `batch_tokens` counts padding."""

    steps: int
    seed: int
    batch_tokens: int = 4096
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.05


@dataclass(frozen=True)
class MassScale:
    """Mean and standard deviation of each layer's masses over tokens and experts, float64 [L]."""

    mean_L: torch.Tensor
    std_L: torch.Tensor

    @classmethod
    def of(cls, mass_TS: torch.Tensor, cuts: Sequence[LayerCut]) -> MassScale:
        layers = _split(mass_TS.double(), cuts)
        means = [x.mean() if x.numel() else torch.zeros(()) for x in layers]
        stds = [x.std() if x.numel() else torch.ones(()) for x in layers]
        return cls(torch.stack(means), torch.stack(stds).clamp_min(1e-12))

    def targets(self, mass_TS: torch.Tensor, cuts: Sequence[LayerCut]) -> torch.Tensor:
        """Standardised and centred masses, float32 [T, S]."""
        parts = [
            (x - x.mean(dim=-1, keepdim=True)) / std.float()
            for x, std in zip(_split(mass_TS, cuts), self.std_L, strict=True)
        ]
        return torch.cat(parts, dim=-1)


def _split(x_TS: torch.Tensor, cuts: Sequence[LayerCut]) -> tuple[torch.Tensor, ...]:
    return x_TS.split([c.num_routed for c in cuts], dim=-1)


@torch.enable_grad()
def train(router: PathRouter, pool: TargetPool, options: TrainingOptions, progress: Progress) -> list[float]:
    """Train `router` in place on the documents and masses of `pool`; returns the loss of every step."""
    scale = MassScale.of(torch.cat(pool.mass), router.cuts)
    targets = [scale.targets(mass, router.cuts) for mass in pool.mass]
    optimizer = torch.optim.AdamW(router.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    losses: list[float] = []
    order = _endless_batches(pool.rows, options)
    with progress.stage("training the path router", options.steps) as advance:
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * _schedule(step, options)
            batch = next(order)
            ids_BN, mask_BN = padded([pool.rows[i] for i in batch])
            scores_BNS, _ = router(ids_BN)
            target_TS = torch.cat([targets[i] for i in batch])
            loss = torch.nn.functional.mse_loss(scores_BNS[mask_BN.bool()], target_TS)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            advance(1)
    return losses


def _schedule(step: int, options: TrainingOptions) -> float:
    warmup = min(1.0, (step + 1) / max(1.0, options.warmup_share * options.steps))
    return warmup * 0.5 * (1 + math.cos(math.pi * step / options.steps))


def _endless_batches(rows: Sequence[list[int]], options: TrainingOptions) -> Iterator[list[int]]:
    """Batches of documents of like length, in an order that `seed` shuffles anew each time round."""
    generator = torch.Generator().manual_seed(options.seed)
    groups = list(batches(rows, options.batch_tokens))
    while True:
        for index in torch.randperm(len(groups), generator=generator).tolist():
            yield groups[index]


@torch.no_grad()
def hit_rate(router: PathRouter, pool: TargetPool) -> dict[str, float]:
    """How the router's choices agree with the oracle's over the documents of `pool`."""
    tally = Tally()
    for row, mass_TS in zip(pool.rows, pool.mass, strict=True):
        scores_TS = router(torch.tensor([row]))[0][0]
        for cut, scores, mass in zip(
            router.cuts, _split(scores_TS, router.cuts), _split(mass_TS, router.cuts), strict=True
        ):
            if 0 < cut.num_active < cut.num_routed:
                tally.add(top_k(scores, cut.num_active), top_k(mass, cut.num_active))
    return tally.figures()
