from __future__ import annotations

import torch
from torch import nn

from pregate.convert.tune.parameters import add_low_rank, merge_low_rank


class Stack(nn.Module):
    """Two experts [2, 6, 4] and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(2, 6, 4))
        self.linear = nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.einsum("td,rad->tra", x, self.experts)).sum(dim=1)


def test_it_starts_as_no_change_and_only_it_is_trained():
    model, x = Stack(), torch.randn(3, 4)
    before = model(x)
    added = add_low_rank(model, ["experts", "linear.weight"], rank=2, alpha=8, seed=0)
    assert torch.equal(model(x), before)
    shapes = sorted(tuple(p.shape) for p in added.values())
    assert shapes == [(2, 2, 4), (2, 6), (2, 6, 2), (6, 2)]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(added)
    model(x).sum().backward()
    ups = [p for n, p in added.items() if n.endswith(".up")]
    assert all(p.grad.abs().sum() > 0 for p in ups)


def test_merged_it_is_the_weight_by_hand():
    """Rank 1, alpha 4: W + 4 up down."""
    model, x = Stack(), torch.randn(3, 4)
    weight = model.experts.detach().clone()
    added = add_low_rank(model, ["experts"], rank=1, alpha=4, seed=0)
    up, down = (next(p for n, p in added.items() if n.endswith(part)) for part in (".up", ".down"))
    with torch.no_grad():
        up.fill_(0.5)
        changed = model(x)
        expected = weight + 4 * 0.5 * down
        merge_low_rank(model)
        assert dict(model.named_parameters()).keys() == {"experts", "linear.weight"}
        torch.testing.assert_close(model.experts.data, expected)
        torch.testing.assert_close(model(x), changed)


def test_the_seed_decides_the_start():
    downs = []
    for seed in (0, 0, 1):
        added = add_low_rank(Stack(), ["experts"], rank=2, alpha=4, seed=seed)
        downs.append(next(p for n, p in added.items() if n.endswith(".down")).detach())
    assert torch.equal(downs[0], downs[1])
    assert not torch.equal(downs[0], downs[2])
