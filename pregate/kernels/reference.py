"""Plain-torch truth of each operation; the oracle of every kernel test.

Shape letters: T tokens, D hidden width, M expert width, R routed experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch.nn import functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]
#: By transformers' names. The others are transformers' own: importing those takes a host longer than torch does.
_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}
)


def activation(name: str) -> Activation:
    """Return the gate activation a transformers config calls `name` (silu, gelu_pytorch_tanh, ...)."""
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name]
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def gated_hidden(x_TD: torch.Tensor, gate_up: torch.Tensor, act: Activation) -> torch.Tensor:
    """Return h [T, M] = act(x W_gate') * (x W_up') for `gate_up` [2M, D], gate rows first."""
    gate_TM, up_TM = F.linear(x_TD, gate_up).chunk(2, dim=-1)
    return act(gate_TM) * up_TM


def expert_ffn(x_TD: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, act: Activation) -> torch.Tensor:
    """Run one expert on rows [T, D]: `gate_up` [2M, D], `down` [D, M]; returns [T, D]."""
    return F.linear(gated_hidden(x_TD, gate_up, act), down)


def add_routed(
    out_TD: torch.Tensor,
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor | None,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act: Activation,
) -> torch.Tensor:
    """Add each token's routed experts to `out_TD` (the shared expert's output), in ascending expert id.

    `ids_TK` int64, -1 where a token has fewer than K experts; `gate_up_proj` [R, 2M, D], `down_proj` [R, D, M].

    Example: ids [[0, 2], [2, -1]] adds expert 0 to token 0, then expert 2 to tokens 0 and 1.
    """
    for expert in range(gate_up_proj.shape[0]):
        rows, slots = torch.where(ids_TK == expert)
        if rows.numel() == 0:
            continue
        y = expert_ffn(x_TD[rows], gate_up_proj[expert], down_proj[expert], act)
        if weights_TK is not None:
            y = y * weights_TK[rows, slots].unsqueeze(-1).to(y.dtype)
        out_TD = out_TD.index_add(0, rows, y)
    return out_TD


def top_k(scores_TR: torch.Tensor, num_active: int) -> torch.Tensor:
    """Return the ids [T, K] (int64, ascending) of the K highest scores; ties go to the lower id.

    Example: scores [[0.5, 0.9, 0.5]], K = 2 gives [[0, 1]].
    """
    order = torch.argsort(scores_TR, dim=-1, descending=True, stable=True)
    return order[:, :num_active].sort(dim=-1).values


def above(scores_TR: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Return the ids [T, R] (int64, ascending, then -1) of all scores at or above `threshold` (a scalar tensor).

    Example: scores [[0.5, 0.9, 0.1]], threshold 0.5 gives [[0, 1, -1]].
    """
    num_routed = scores_TR.shape[-1]
    ids_TR = torch.arange(num_routed, device=scores_TR.device).expand_as(scores_TR)
    ids_TR = ids_TR.masked_fill(scores_TR < threshold, num_routed).sort(dim=-1).values
    return ids_TR.masked_fill(ids_TR == num_routed, -1)


def chosen_by(scores_TR: torch.Tensor, num_active: int, threshold: torch.Tensor | None) -> torch.Tensor:
    """Bool [T, R]: the `num_active` highest scores of each token, ties to the lower id; or all at `threshold` or more.

    Example: scores [[0.5, 0.9, 0.5]] give [[T, T, F]] with 2 active, and [[T, T, T]] with threshold 0.5.
    """
    if threshold is not None:
        return scores_TR >= threshold
    return torch.zeros_like(scores_TR, dtype=torch.bool).scatter_(1, top_k(scores_TR, num_active), True)


def choose_sets(scores_TR: torch.Tensor, num_active: int, selection: str) -> torch.Tensor:
    """Bool [T, R]: the `num_active` best of each token, or as many pairs of all those above one threshold."""
    if selection == "threshold":
        return scores_TR >= threshold_for(scores_TR, num_active)
    chosen = torch.zeros_like(scores_TR, dtype=torch.bool)
    return chosen.scatter_(1, scores_TR.topk(num_active, dim=1).indices, True)


def threshold_for(scores_TR: torch.Tensor, mean_active: float) -> torch.Tensor:
    """The score that makes the mean number of experts at or above it `mean_active`; infinite for none and for all."""
    if mean_active in (0, scores_TR.shape[1]):
        return scores_TR.new_full((), -torch.inf if mean_active else torch.inf)
    return scores_TR.flatten().topk(max(1, round(scores_TR.shape[0] * mean_active))).values[-1]
