"""Low-rank changes of weights (LoRA, Hu et al. 2021), for matrices [A, B] and stacks of them [R, A, B].

Shape letters: R experts of a stack (none for a matrix), A rows, B columns, K rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """W + `scaling` * up @ down; `up` [(R,) A, K] starts at 0, `down` [(R,) K, B] at random."""

    def __init__(self, weight: torch.Tensor, rank: int, scaling: float) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        self.scaling = scaling
        self.up = nn.Parameter(weight.new_zeros(*stack, rows, rank))
        self.down = nn.Parameter(torch.randn(*stack, rank, columns).to(weight) / columns**0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scaling * (self.up @ self.down)


def add_low_rank(model: nn.Module, names: Iterable[str], rank: int, alpha: float, seed: int) -> dict[str, nn.Parameter]:
    """Give each weight of `model` named in `names` (2-D or 3-D) a trainable low-rank change and freeze the weight.

    Returns the new parameters by their names in `model`.
    """
    added: dict[str, nn.Parameter] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            change = LowRank(getattr(module, attribute).requires_grad_(False), rank, alpha / rank)
            parametrize.register_parametrization(module, attribute, change)
            prefix = f"{owner}.parametrizations.{attribute}.0.".removeprefix(".")
            added |= {prefix + part: parameter for part, parameter in change.named_parameters()}
    return added


def merge_low_rank(model: nn.Module) -> None:
    """Make every low-rank change part of the weight it changes; the model has its old tensor names again."""
    for module in list(model.modules()):
        for attribute in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
