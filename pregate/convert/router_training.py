"""Training a path router: regression of every layer's contribution masses from token ids alone.

What the masses are turned into, and why, is said at `MassScale`; the embedding starts from the parent's.

Shape letters: B documents of a batch, N tokens, T tokens of all documents, S the routed experts of all layers side by
side, L layers, V vocabulary, D the parent's hidden width, C router width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pregate.convert.agreement import Tally
from pregate.convert.capture import threshold_for
from pregate.convert.progress import Progress
from pregate.convert.scoring import batches, padded
from pregate.convert.targets import TargetPool
from pregate.kernels.reference import above, top_k
from pregate.model.config import LayerCut
from pregate.model.path_router import PathRouter, choose_experts

#: Added to a token's spread of standardised masses before they are divided by it.
LEAST_SPREAD = 0.05
#: Standard deviation the embedding starts with: small, so that the first steps already move it.
EMBEDDING_STD = 0.3


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how fast a path router is trained; `batch_tokens` counts padding."""

    steps: int
    seed: int
    batch_tokens: int = 1024
    learning_rate: float = 6e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.05


@dataclass(frozen=True)
class MassScale:
    """Standard deviation and mean of each layer's masses over tokens and experts, [L]: brings layers to one scale."""

    std_L: torch.Tensor
    mean_L: torch.Tensor

    @classmethod
    def of(cls, mass_TS: torch.Tensor, cuts: Sequence[LayerCut]) -> MassScale:
        layers = [x.double() if x.numel() else torch.zeros(2, dtype=torch.float64) for x in _split(mass_TS, cuts)]
        stds = torch.stack([x.std() for x in layers]).clamp_min(1e-12)
        return cls(stds.float(), torch.stack([x.mean() for x in layers]).float())

    def targets(self, mass_TS: torch.Tensor, cuts: Sequence[LayerCut], selection: str) -> torch.Tensor:
        """What the router regresses, float32 [T, S].

        With selection by threshold, masses in units of their layer's standard deviation: how much an expert would
        contribute counts, not only its rank. With a fixed number, they are then centred within each token and layer:
        only the order of a layer's experts decides, and a common rise of all of them is nothing to learn. Each
        token's masses are divided by their own spread, so that a few tokens of huge mass do not rule the squared
        error. (The latter measured on stories3M S3A3E8 cut by the recipe "plain", 1000 steps, held-out perplexity:
        standardised only 11.71 with one seed; means of four seeds: centred 11.53, as here 11.46; a seed moves it by
        0.05.)
        """
        parts = []
        for x, std, mean in zip(_split(mass_TS, cuts), self.std_L, self.mean_L, strict=True):
            if selection == "threshold":
                parts.append((x - mean) / std)
                continue
            centred = (x - x.mean(dim=-1, keepdim=True)) / std
            spread = centred.std(dim=-1, keepdim=True) if centred.shape[-1] > 1 else centred.abs()
            parts.append(centred / (spread + LEAST_SPREAD))
        return torch.cat(parts, dim=-1)


@torch.no_grad()
def start_from(router: PathRouter, parent_VD: torch.Tensor) -> None:
    """Start the router's embedding from the principal components of the parent's, so that rare tokens have a place.

    Columns beyond the parent's width keep their random start, on the same scale. (Measured likewise, with another
    seed: 11.43, random start of the same size 11.52.)
    """
    centred_VD = parent_VD.double() - parent_VD.double().mean(dim=0)
    _, components_DD = torch.linalg.eigh(centred_VD.T @ centred_VD)  # ascending eigenvalues
    weight_VC = router.embedding.weight
    width = min(weight_VC.shape[1], parent_VD.shape[1])
    projected_VC = centred_VD @ components_DD.flip(1)[:, :width]
    weight_VC.mul_(EMBEDDING_STD)
    weight_VC[:, :width] = projected_VC / projected_VC.std() * EMBEDDING_STD


def _split(x_TS: torch.Tensor, cuts: Sequence[LayerCut]) -> tuple[torch.Tensor, ...]:
    return x_TS.split([c.num_routed for c in cuts], dim=-1)


@torch.enable_grad()
def train(router: PathRouter, pool: TargetPool, options: TrainingOptions, progress: Progress) -> list[float]:
    """Train `router` in place on the documents and masses of `pool`.

    Returns the loss of every step: the squared error as a share of the targets' variance.
    """
    scale = MassScale.of(torch.cat(pool.mass), router.cuts)
    targets = [scale.targets(mass, router.cuts, router.selection) for mass in pool.mass]
    variance = torch.cat(targets).var().clamp_min(1e-12)
    optimizer = torch.optim.AdamW(router.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    losses: list[float] = []
    order = _endless_batches(pool.rows, options)
    with progress.stage("training the path router", options.steps) as advance:
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * _schedule(step, options)
            batch = next(order)
            loss = _squared_error(router, [pool.rows[i] for i in batch], [targets[i] for i in batch]) / variance
            loss.backward()
            torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            advance(1)
    return losses


def _squared_error(router: PathRouter, rows: list[list[int]], targets: list[torch.Tensor]) -> torch.Tensor:
    ids_BN, mask_BN = padded(rows)
    scores_BNS, _ = router(ids_BN)
    return torch.nn.functional.mse_loss(scores_BNS[mask_BN.bool()], torch.cat(targets))


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
def set_thresholds(router: PathRouter, pool: TargetPool) -> None:
    """Set each layer's threshold so that its experts' mean number per token of `pool` is the layer's `num_active`."""
    scores_TS = torch.cat([router(torch.tensor([row]))[0][0] for row in pool.rows])
    for layer, (cut, scores_TR) in enumerate(zip(router.cuts, _split(scores_TS, router.cuts), strict=True)):
        router.thresholds[layer] = threshold_for(scores_TR, cut.num_active) if cut.num_routed else torch.inf


@torch.no_grad()
def hit_rate(router: PathRouter, pool: TargetPool, mass_thresholds: Sequence[torch.Tensor]) -> dict[str, float]:
    """How the router's choices agree with the oracle's over the documents of `pool`.

    `mass_thresholds` is each layer's `RoutedMLP.mass_threshold`, by which the oracle chooses where the router does so.
    """
    tally = Tally()
    for row, mass_TS in zip(pool.rows, pool.mass, strict=True):
        chosen = choose_experts(router, router(torch.tensor([row]))[0][0])
        masses = _split(mass_TS, router.cuts)
        for cut, (ids_TK, _), mass_TR, limit in zip(router.cuts, chosen, masses, mass_thresholds, strict=True):
            if 0 < cut.num_active < cut.num_routed:
                by_rank = router.selection == "top_k"
                tally.add(ids_TK, top_k(mass_TR, cut.num_active) if by_rank else above(mass_TR, limit.cpu()))
    return tally.figures()
