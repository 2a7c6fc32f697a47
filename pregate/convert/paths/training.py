"""Training a path router from token ids alone, or a read network from the states of a layer: batches, schedule,
thresholds and its hit rate.

What is lowered is said in `losses.py`; the embedding starts from the parent's, or is tied to it.

Shape letters: B documents of a batch, N tokens, T tokens of all documents, S the routed experts of all layers side by
side, R those of one, O the heads' outputs, L layers, V vocabulary, D the parent's hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from pregate.convert.files.partial import PartialCheckpoint, moments, put_moments
from pregate.convert.measure.agreement import Tally, layer_figures
from pregate.convert.paths.losses import Router, loss_for
from pregate.convert.paths.parent_embedding import ParentEmbedding, start_from
from pregate.convert.paths.targets import TargetPool
from pregate.convert.progress import Progress
from pregate.convert.text.batches import batches, padded
from pregate.kernels.reference import above, top_k
from pregate.model.factors import TABLE
from pregate.model.path_router import PathRouter, choose_experts, put_thresholds, split_layers
from pregate.model.read_gate import ReadNetwork

#: The last loss reported of a training is the mean over one step in this many, at its end.
LAST_SHARE = 20
#: Steps after which a run is kept.
SAVE_EVERY = 100


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how fast a path router is trained, and on what; `batch_tokens` counts padding.

    Of a batch at most `piece_tokens` (or one document) are run at a time: bounds the memory; the step is the same.
    `target`: see `losses.py`. `embedding` "own" is learned, "parent" the parent's times a learned projection.
    """

    steps: int
    seed: int
    target: str = "mass"
    embedding: str = "own"
    batch_tokens: int = 1024
    piece_tokens: int = 8192
    learning_rate: float = 6e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.05


@torch.enable_grad()
def train(
    router: Router,
    parent_VD: torch.Tensor | None,
    pool: TargetPool,
    options: TrainingOptions,
    progress: Progress,
    partial: PartialCheckpoint | None = None,
) -> list[float]:
    """Train `router` in place on the documents and masses of `pool`; `parent_VD` is the parent's embedding, which the
    router's starts from (a read network has none); None goes on with the router as it is. Every `SAVE_EVERY` steps the
    run is kept in `partial`, and goes on where an interrupted one stopped: the result is the same, bit for bit.

    Returns the loss of every step.
    """
    model: Any = router
    device = next(router.parameters()).device
    if isinstance(router, PathRouter) and parent_VD is not None:
        if options.embedding == "parent":
            model.embedding = ParentEmbedding(parent_VD, router.config.dim).to(device)
        else:
            start_from(router, parent_VD)
    loss_of = loss_for(options.target, router, torch.cat(pool.mass))
    targets = [loss_of.targets(mass) for mass in pool.mass]
    loss_of.to(device)
    optimizer = torch.optim.AdamW(router.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    named = dict(router.named_parameters())
    losses = _resumed(router, named, optimizer, partial)
    done = len(losses)
    order = islice(_endless_batches(pool.rows, options), done, None)
    name = "path router" if isinstance(router, PathRouter) else "read network"
    with progress.stage(f"training the {name}", options.steps) as advance:
        advance(done)
        for step in range(done, options.steps):
            factor = rate_factor(step, options.warmup_share * options.steps, step / options.steps)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * factor
            batch = next(order)
            outputs_TO = outputs_of(router, [pool.inputs[i] for i in batch], options.piece_tokens)
            loss = loss_of(outputs_TO, torch.cat([targets[i] for i in batch]).to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if partial is not None and ((step + 1) % SAVE_EVERY == 0 or step + 1 == options.steps):
                weights = {f"now/{name}": parameter for name, parameter in named.items()}
                partial.layer_done(weights | moments(named, optimizer), {"losses": losses}, step + 1)
            advance(1)
    if isinstance(router, PathRouter) and isinstance(model.embedding, ParentEmbedding):
        router.factors = {f"{TABLE}.{part}": factor for part, factor in model.embedding.factors.items()}
        model.embedding = model.embedding.fold()
    return losses


def rate_factor(step: int, warmup_steps: float, share_done: float) -> float:
    """What the learning rates of step `step` (from 0) are multiplied by: a rise over `warmup_steps`, then a cosine."""
    warmup = min(1.0, (step + 1) / max(1.0, warmup_steps))
    return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, share_done)))


def _resumed(
    router: Router,
    named: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    partial: PartialCheckpoint | None,
) -> list[float]:
    """The losses of the steps that an interrupted run has done, router and optimizer brought to where it was."""
    if partial is None or not partial.state.layers_done:
        return []
    tensors = partial.hidden(next(router.parameters()).device)
    router.load_state_dict({name: tensors[f"now/{name}"] for name in named}, strict=False)
    put_moments(named, optimizer, tensors)
    return list(partial.state.carried["losses"])


def first_and_last(losses: list[float]) -> dict[str, float]:
    """What is reported of a training: its first loss, and the mean over its last steps (one in `LAST_SHARE`)."""
    last = losses[-max(1, len(losses) // LAST_SHARE) :]
    return {"loss_first": round(losses[0], 4), "loss_last": round(sum(last) / len(last), 4)}


def outputs_of(router: Router, rows: list[Any], piece_tokens: int) -> torch.Tensor:
    """What the heads give for the tokens of `rows`, ids or states, longest first, [T, O]: scores, or codes' logits.

    Of more than `piece_tokens`, padding included, only these outputs are kept: a piece is run anew when its gradient is
    wanted. So a loss of all tokens together, such as that of a threshold, is the same however they are cut.
    """
    pieces = list(batches(rows, piece_tokens))
    assert [i for piece in pieces for i in piece] == list(range(len(rows))), "rows are not longest first"
    if len(pieces) == 1:
        return _outputs(router, rows)
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(_outputs, router, [rows[i] for i in piece], **settings) for piece in pieces])


def _outputs(router: Router, rows: list[Any]) -> torch.Tensor:
    device = router.thresholds.device
    if isinstance(router, ReadNetwork):
        return router(torch.cat(rows).to(device))
    ids_BN, mask_BN = (t.to(device) for t in padded(rows))
    return router.heads(router.encode(ids_BN)[0][mask_BN.bool()])


def _endless_batches(rows: Sequence[list[int]], options: TrainingOptions) -> Iterator[list[int]]:
    """Batches of documents of like length, in an order that `seed` shuffles anew each time round."""
    generator = torch.Generator().manual_seed(options.seed)
    groups = list(batches(rows, options.batch_tokens))
    while True:
        yield from (groups[index] for index in torch.randperm(len(groups), generator=generator).tolist())


@torch.no_grad()
def set_thresholds(router: Router, pool: TargetPool, progress: Progress) -> None:
    """Set each layer's threshold so that its experts' mean number per token of `pool` is `pool.mean_active`."""
    scores = []
    with progress.stage("setting thresholds", len(pool.rows)) as advance:
        for row in pool.inputs:
            scores.append(_scores(router, row))
            advance(1)
    if isinstance(router, ReadNetwork):
        router.put_thresholds(torch.cat(scores), pool.mean_active)
    else:
        put_thresholds(router, torch.cat(scores), pool.mean_active)


def _scores(router: Router, row: Any) -> torch.Tensor:
    """Scores [N, S] of a document's ids or states."""
    if isinstance(router, ReadNetwork):
        return _outputs(router, [row])
    return router(torch.tensor([row], device=router.thresholds.device))[0][0]


def _choices(router: Router, scores_NS: torch.Tensor) -> Sequence[torch.Tensor]:
    """Ids [N, K] that scores choose, layer by layer of `router.cuts`."""
    if isinstance(router, PathRouter):
        return choose_experts(router, scores_NS).ids.unbind(dim=1)
    layers = enumerate(split_layers(scores_NS, router.cuts), start=router.config.layer)
    return [router.choose(layer, scores_NR).ids for layer, scores_NR in layers]


@torch.no_grad()
def hit_rate(router: Router, pool: TargetPool, progress: Progress) -> dict[str, Any]:
    """How the router's choices agree, over the documents of `pool`, with those that its masses and limits make.

    In all, and layer by layer for those that have a choice.
    """
    first = router.config.layer if isinstance(router, ReadNetwork) else 0
    tallies = {n: Tally() for n, c in enumerate(router.cuts) if 0 < c.num_active < c.num_routed}
    with progress.stage("comparing choices", len(pool.rows)) as advance:
        for row, mass_TS in zip(pool.inputs, pool.mass, strict=True):
            chosen = _choices(router, _scores(router, row))
            masses = split_layers(mass_TS, router.cuts)
            for layer, tally in tallies.items():
                best, num_active = masses[layer], router.cuts[layer].num_active
                by_rank = router.selection == "top_k"
                tally.add(chosen[layer].cpu(), top_k(best, num_active) if by_rank else above(best, pool.limits[layer]))
            advance(1)
    return layer_figures({first + layer: tally for layer, tally in tallies.items()})
