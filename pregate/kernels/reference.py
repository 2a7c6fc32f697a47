"""Plain-torch truth of each operation; the oracle of every kernel test.

Shape letters: T tokens, D hidden width, M expert width, R routed experts, K experts per token. What a step does
besides experts (`step.py`): H = Q + 2 G heads (queries, keys, values), E head width, W rotated width, S slots of the
cache, A rows that attend, B block tables, N blocks of a table, C tokens of a context.
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


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / rms(x) * weight [T, D]. Example: [[3, 4]], weight [1, 2] and eps 0 give [[3, 8]] / sqrt(12.5)."""
    return x_TD * torch.rsqrt(x_TD.square().mean(dim=-1, keepdim=True) + eps) * weight_D


def rotate(x_THE: torch.Tensor, cos_TW: torch.Tensor, sin_TW: torch.Tensor) -> torch.Tensor:
    """Return heads with their first W columns turned, column w with column w + W / 2; the first half of the columns of
    `sin_TW` is negated. Example: the quarter turn cos [0, 0], sin [-1, 1] makes [1, 2, 9] of one head [-2, 1, 9]."""
    turned_THW, rest = x_THE.split([cos_TW.shape[1], x_THE.shape[2] - cos_TW.shape[1]], dim=-1)
    swapped_THW = turned_THW.roll(cos_TW.shape[1] // 2, dims=-1)
    return torch.cat([turned_THW * cos_TW[:, None] + swapped_THW * sin_TW[:, None], rest], dim=-1)


def place(
    heads_THE: torch.Tensor,
    cos_TW: torch.Tensor,
    sin_TW: torch.Tensor,
    slot_T: torch.Tensor,
    keys_SGE: torch.Tensor,
    values_SGE: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return heads with queries and keys rotated, and the cache's keys and values with those of row t in slot
    `slot_T[t]`, 0 in place of what is not finite. Example: slots [3, 1] store row 0 in slot 3 and row 1 in slot 1."""
    num_kv = keys_SGE.shape[1]
    turned, value = rotate(heads_THE[:, :-num_kv], cos_TW, sin_TW), heads_THE[:, -num_kv:]
    keys_SGE = keys_SGE.index_copy(0, slot_T, turned[:, -num_kv:].nan_to_num(0.0, 0.0, 0.0))
    values_SGE = values_SGE.index_copy(0, slot_T, value.nan_to_num(0.0, 0.0, 0.0))
    return torch.cat([turned, value], dim=1), keys_SGE, values_SGE


def attend(
    q_AQE: torch.Tensor,
    keys_SGE: torch.Tensor,
    values_SGE: torch.Tensor,
    length_A: torch.Tensor,
    table_A: torch.Tensor,
    block_BN: torch.Tensor,
    block_size: int,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Return [A, Q, E]: each row's queries attend to the first `length_A[a]` tokens in blocks `block_BN[table_A[a]]` of
    the cache, of these to the last `window` (0: all), with scores capped by `softcap` (0: not).

    Example: lengths [3, 17], tables [1, 0], blocks [[4, 2], [7, 0]] of 16: row 0 reads slots 112 to 114, row 1 reads
    64 to 79 and 32.
    """
    out, repeat = [], q_AQE.shape[1] // keys_SGE.shape[1]
    for q_QE, length, table in zip(q_AQE, length_A.tolist(), table_A.tolist(), strict=True):
        slot_C = (block_BN[table][:, None] * block_size + torch.arange(block_size)).flatten()[:length][-window:]
        k_CQE, v_CQE = (part[slot_C].repeat_interleave(repeat, dim=1) for part in (keys_SGE, values_SGE))
        score_QC = torch.einsum("qe,cqe->qc", q_QE, k_CQE) * scaling
        if softcap:
            score_QC = softcap * torch.tanh(score_QC / softcap)
        out.append(torch.einsum("qc,cqe->qe", score_QC.softmax(dim=1), v_CQE))
    return torch.stack(out)
