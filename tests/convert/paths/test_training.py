"""A router's step taken in pieces is the step of one batch, and no more than a piece is in memory at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pregate.convert.paths.losses import loss_for
from pregate.convert.paths.targets import TargetPool
from pregate.convert.paths.training import TrainingOptions, outputs_of, train
from pregate.convert.progress import QUIET
from pregate.model.config import LayerCut, PathRouterConfig
from pregate.model.path_router import PathRouter

CUTS = (LayerCut(5, 0, 2, 1), LayerCut(0, 1, 0, 4), LayerCut(5, 0, 2, 1))
LENGTHS = (40, 40, 33, 25, 25, 24, 7, 2)  # longest first, as `batches` gives them
KINDS: list[dict[str, Any]] = [
    {"target": "mass"},
    {"target": "paper", "heads": "single"},
    {"target": "captured", "weights": "learned"},
    {"target": "captured", "selection": "threshold", "heads": "recurrent"},
    {"target": "captured", "gate": "dselect"},
    {"target": "captured", "gate": "dselect", "selection": "threshold"},
]


def make(kind: dict[str, Any], window: int = 9) -> tuple[PathRouter, str]:
    fields = {name: value for name, value in kind.items() if name not in ("target", "selection")}
    torch.manual_seed(3)
    config = PathRouterConfig(dim=16, num_blocks=2, window=window, **fields)
    return PathRouter(config, 50, CUTS, kind.get("selection", "top_k")), kind["target"]


def make_pool(lengths: tuple[int, ...] = LENGTHS) -> TargetPool:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(50, (n,), generator=generator).tolist() for n in lengths]
    mass = [torch.rand(n, 10, generator=generator) for n in lengths]
    return TargetPool(rows, mass, (torch.tensor(0.5),) * 3, (2.0, 0.0, 2.0))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_step_in_pieces_is_the_step_of_one_batch(kind: dict[str, Any]):
    """Losses that set a threshold over all tokens of a step too."""

    def step(piece_tokens: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        (router, target), pool = make(kind), make_pool()
        loss_of = loss_for(target, router, torch.cat(pool.mass))
        targets_TS = torch.cat([loss_of.targets(mass) for mass in pool.mass])
        loss = loss_of(outputs_of(router, pool.rows, piece_tokens), targets_TS)
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in router.named_parameters() if p.grad is not None}

    (loss, whole), (again, pieces) = step(1000), step(50)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-7)
    assert whole.keys() == pieces.keys()
    assert len(whole) > 14
    for name, gradient in whole.items():
        assert gradient.abs().max() > 1e-5, name
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def seen_tokens(router: PathRouter) -> list[int]:
    """Tokens, padding included, of every run of the router's first block from now on."""
    seen: list[int] = []
    router.blocks[0].register_forward_pre_hook(lambda _block, args: seen.append(args[0].shape[:2].numel()))
    return seen


def trained(piece_tokens: int) -> tuple[list[float], PathRouter, list[int]]:
    router, target = make({"target": "captured", "selection": "threshold"})
    seen = seen_tokens(router)
    options = TrainingOptions(6, 0, target, batch_tokens=200, piece_tokens=piece_tokens, learning_rate=1e-3)
    return train(router, None, make_pool(), options, QUIET), router, seen


def test_training_in_pieces_is_training_and_holds_a_piece_at_a_time():
    whole, one, seen = trained(200)
    assert max(seen) > 100
    assert len(seen) == 6
    pieces, other, seen = trained(50)
    assert max(seen) <= 50
    assert pieces == pytest.approx(whole, rel=1e-4)
    for (name, one_weight), other_weight in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(other_weight, one_weight, rtol=0, atol=1e-4, msg=name)


def test_what_is_kept_for_the_gradient_is_a_pieces():
    """Bytes that the forward pass of a step leaves behind, of all but the loss."""

    def kept(piece_tokens: int) -> int:
        (router, _), sizes = make({"target": "mass"}), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            outputs_of(router, make_pool().rows, piece_tokens)
        return sum(sizes)

    assert kept(50) < 0.05 * kept(1000)
