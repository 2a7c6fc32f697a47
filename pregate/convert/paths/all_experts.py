"""A routed layer computed densely: hidden values of all routed experts in one product, and what is made of them; or by
those experts alone that tokens chose.

Shape letters: T tokens, D hidden width, R routed experts, M expert width, K experts of a token (at most).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pregate.kernels.reference import expert_ffn
from pregate.model.gates import Choice
from pregate.model.layers import RoutedMLP, by_token_power


def routed_hidden(mlp: RoutedMLP, x_TD: torch.Tensor) -> torch.Tensor:
    """h of all routed experts [T, R, M]."""
    assert mlp.experts is not None
    product_TRM = F.linear(x_TD, mlp.experts.gate_up_proj.flatten(0, 1)).unflatten(1, (mlp.cut.num_routed, -1))
    gate_TRM, up_TRM = product_TRM.chunk(2, dim=-1)
    return mlp.act(gate_TRM) * up_TRM


@torch.no_grad()
def masses(h_TRM: torch.Tensor, down: torch.Tensor, token_power: float) -> torch.Tensor:
    """As `layers.weighted_mass` [T, R], from what is there; `down` [R, D, M]."""
    mass_TR = torch.linalg.vecdot(h_TRM.abs().float(), down.float().norm(dim=1))
    return by_token_power(mass_TR, mass_TR.sum(dim=-1, keepdim=True), token_power)


def add_weighted(
    out_TD: torch.Tensor, h_TRM: torch.Tensor, weights_TR: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """`out_TD` and what the experts give, each times its weight: 0 where it is not chosen."""
    weighted_TRM = h_TRM * weights_TR[:, :, None].to(h_TRM.dtype)
    return out_TD + F.linear(weighted_TRM.flatten(1), down.transpose(0, 1).flatten(1))


def add_chosen(mlp: RoutedMLP, out_TD: torch.Tensor, x_TD: torch.Tensor, weights_TR: torch.Tensor) -> torch.Tensor:
    """The same, each expert run on the tokens alone where its weight is not 0; weights get no gradient."""
    assert mlp.experts is not None
    weights = zip(mlp.experts.gate_up_proj.unbind(), mlp.experts.down_proj.unbind(), strict=True)
    for expert, (gate_up, down) in enumerate(weights):
        rows = weights_TR[:, expert].nonzero()[:, 0]
        y = expert_ffn(x_TD[rows], gate_up, down, mlp.act)
        out_TD = out_TD.index_add(0, rows, (y * weights_TR[rows, expert, None]).to(out_TD.dtype))
    return out_TD


def expert_weights(choice: Choice, num_routed: int) -> torch.Tensor:
    """The weight of every expert [T, R] in a choice; 0 for those that are not in it.

    Example: ids [[0, 2], [1, -1]] of 3 experts, weights 1: [[1, 0, 1], [0, 1, 0]].
    """
    weights_TK = torch.ones(choice.ids.shape).to(choice.ids.device) if choice.weights is None else choice.weights
    places_TK = choice.ids.masked_fill(choice.ids < 0, num_routed)
    weights_TR = weights_TK.new_zeros(len(choice.ids), num_routed + 1)
    return weights_TR.scatter_(1, places_TK, weights_TK)[:, :num_routed]
