"""Routing policies to compare a real router with: random choice, the oracle, every expert on.

Set one as `RoutedForCausalLM.routing_policy`. Shape letters: T tokens, D hidden width, R routed experts, K active.
"""

from __future__ import annotations

import torch

from pregate.kernels.reference import top_k
from pregate.model.layers import RoutedMLP, contribution_mass

Choice = tuple[torch.Tensor, torch.Tensor | None]


class RandomPolicy:
    """Each token and layer gets `num_active` experts at random, the same for the same seed and order of calls."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        scores_TR = torch.rand(x_TD.shape[0], mlp.cut.num_routed, generator=self._generator)
        return top_k(scores_TR.to(x_TD.device), mlp.cut.num_active), None


class OraclePolicy:
    """The experts of greatest contribution mass, which no router can know without computing them all."""

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        return top_k(contribution_mass(mlp, x_TD), mlp.cut.num_active), None


class AllPolicy:
    """Every routed expert, weights 1: the dense model again."""

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        return torch.arange(mlp.cut.num_routed, device=x_TD.device).expand(x_TD.shape[0], -1), None
