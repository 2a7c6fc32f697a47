"""Attention of a step over our paged KV cache: many sequences at once, decode tokens and prompt chunks.

Shape letters: T new tokens, B decoding sequences, C context tokens, Q heads, G key/value heads, r = Q / G, E head
width, n rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from pregate.base.errors import UserError
from pregate.router.engine.step_layout import PromptChunk, StepLayout

ATTENTION_NAME = "pregate_paged"
#: Arguments transformers passes along that change nothing for us: positions are in the rotary embedding already.
_HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "output_attentions"})


@dataclass(frozen=True)
class AttentionRules:
    """What a layer's attention does with a score: scale it, cap it (Gemma 2: cap * tanh(score / cap)), and how far
    back it looks."""

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None

    @classmethod
    def of(
        cls,
        module: nn.Module,
        head_width: int,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> AttentionRules:
        """The rules in what transformers hands an attention function.

        Raises UserError for any argument that is set and unknown, so that no family is served wrongly in silence.
        """
        unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS and v is not False)
        if unknown or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
            what = ", ".join(unknown) or "a mask, dropout or attention that is not causal"
            raise UserError(
                f"{type(module).__name__} asks attention for {what}; pregate does not know how to serve that"
            )
        return cls(scaling if scaling is not None else head_width**-0.5, sliding_window, softcap)

    def mask(self, distance: torch.Tensor) -> torch.Tensor:
        """What is added to the score of a key `distance` tokens back."""
        hidden = distance < 0
        if self.sliding_window is not None:
            hidden |= distance >= self.sliding_window
        return torch.zeros(distance.shape, device=distance.device).masked_fill_(hidden, -torch.inf)


def attend_joined(
    step: StepLayout,
    layer: int,
    heads_THE: torch.Tensor,
    rotation: tuple[np.ndarray, np.ndarray],
    num_q: int,
    rules: AttentionRules,
) -> torch.Tensor:
    """As `attend`, where the CPU's kernels serve, of queries, keys and values that lie side by side and are rotated
    here, in place."""
    assert step.rows is not None and step.kv.kernels is not None
    step.kv.kernels.place(heads_THE.numpy(), *rotation, step.rows.slot_T, *step.kv.arrays[layer])
    return _attend_rows(step, layer, heads_THE, num_q, rules)


def _attend_rows(step: StepLayout, layer: int, q_THE: torch.Tensor, num_q: int, rules: AttentionRules) -> torch.Tensor:
    """[T, Q, E] of rows whose queries are the first Q of `q_THE`, contiguous; keys and values are stored already."""
    rows, kv = step.rows, step.kv
    assert rows is not None and kv.kernels is not None
    keys, values = kv.arrays[layer]
    out_TQE = torch.empty(len(q_THE), num_q, values.shape[2])
    if len(rows.length_A):
        window, softcap = rules.sliding_window or 0, rules.softcap or 0.0
        contexts = rows.length_A, rows.table_A, rows.block_BN, kv.block_size
        kv.kernels.attend(q_THE.numpy(), keys, values, *contexts, rules.scaling, window, softcap, out_TQE.numpy())
    for chunk in step.chunks:
        here = slice(chunk.row_start, chunk.row_start + chunk.num_rows)
        out_TQE[here] = _prompt(step, layer, chunk, q_THE[here, :num_q], rules)
    return out_TQE


def attend(
    step: StepLayout, layer: int, q_TQE: torch.Tensor, k_TGE: torch.Tensor, v_TGE: torch.Tensor, rules: AttentionRules
) -> torch.Tensor:
    """Store the step's keys and values, then attend; returns [T, Q, E]."""
    step.kv.write(layer, step.slot_T, k_TGE, v_TGE)
    if step.rows is not None:
        return _attend_rows(step, layer, q_TQE.contiguous(), q_TQE.shape[1], rules)
    num_decodes = step.num_decodes
    if not step.chunks:
        return _decode(step, layer, q_TQE, rules)
    parts = [_decode(step, layer, q_TQE[:num_decodes], rules)] if num_decodes else []
    for chunk in step.chunks:
        rows_nQE = q_TQE[chunk.row_start : chunk.row_start + chunk.num_rows]
        parts.append(_prompt(step, layer, chunk, rows_nQE, rules))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(step: StepLayout, layer: int, q_BQE: torch.Tensor, rules: AttentionRules) -> torch.Tensor:
    """One new token per sequence, all sequences at once; returns [B, Q, E].

    The r queries that share a key head are r rows of one matrix.
    """
    lanes, length = step.lanes, step.length
    if lanes is None:
        assert step.block_BN is not None
        k_BCGE, v_BCGE = step.kv.gather(layer, step.block_BN.view(-1), len(step.block_BN))
        k_BCGE, v_BCGE = k_BCGE[:, :length], v_BCGE[:, :length]
    else:
        k_BCGE, v_BCGE = step.kv.lanes(layer, lanes.first, lanes.stride, lanes.num, length)
        if lanes.row_B is not None:
            q_BQE = q_BQE.new_zeros(lanes.num, *q_BQE.shape[1:]).index_copy_(0, lanes.row_B, q_BQE)
    num_groups = k_BCGE.shape[2]
    q_BGrE = q_BQE.unflatten(1, (num_groups, -1))
    mask = step.mask(("decode", rules.sliding_window), lambda: _decode_mask(step, rules))
    out_BGrE = _weigh(q_BGrE, k_BCGE.transpose(1, 2), v_BCGE.transpose(1, 2), mask, rules)
    out_BQE = out_BGrE.flatten(1, 2)
    return out_BQE if lanes is None or lanes.row_B is None else out_BQE.index_select(0, lanes.row_B)


def _decode_mask(step: StepLayout, rules: AttentionRules) -> torch.Tensor | None:
    """Mask [B or lanes, 1, 1, C]; None where every sequence sees the whole context."""
    if step.same_length and (rules.sliding_window is None or step.length <= rules.sliding_window):
        return None
    position_C = torch.arange(step.length, device=step.lengths_B.device)
    mask_BC = rules.mask((step.lengths_B - 1)[:, None] - position_C)
    if step.lanes is not None and step.lanes.row_B is not None:
        # A lane that is no sequence's sees all it has: a row of -inf alone would be no number.
        mask_BC = mask_BC.new_zeros(step.lanes.num, step.length).index_copy_(0, step.lanes.row_B, mask_BC)
    return mask_BC[:, None, None].to(step.kv.keys[0].dtype)


def _prompt(
    step: StepLayout, layer: int, chunk: PromptChunk, q_nQE: torch.Tensor, rules: AttentionRules
) -> torch.Tensor:
    """A chunk of one prompt against its whole context so far; returns [n, Q, E]."""
    if chunk.first_slot is not None:
        keys, values = step.kv.lanes(layer, chunk.first_slot, 0, 1, chunk.length)
    else:
        assert chunk.block_N is not None
        keys, values = step.kv.gather(layer, chunk.block_N, 1)
    k_GCE, v_GCE = (part[:, : chunk.length].transpose(1, 2) for part in (keys, values))
    key = ("prompt", chunk.num_rows, chunk.length, rules.sliding_window)
    mask = step.mask(key, lambda: _chunk_mask(chunk, rules, q_nQE))
    out = _weigh(q_nQE.transpose(0, 1)[None], k_GCE, v_GCE, mask, rules, causal=mask is None)
    return out[0].transpose(0, 1)


def _chunk_mask(chunk: PromptChunk, rules: AttentionRules, q_nQE: torch.Tensor) -> torch.Tensor | None:
    """Mask [1, 1, n, C]; None where it is a prompt's beginning, which is plainly causal."""
    window = rules.sliding_window
    if rules.softcap is None and chunk.num_rows == chunk.length and (window is None or chunk.length <= window):
        return None
    position_C = torch.arange(chunk.length, device=q_nQE.device)
    return rules.mask(position_C[-chunk.num_rows :, None] - position_C)[None, None].to(q_nQE.dtype)


def _weigh(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    rules: AttentionRules,
    causal: bool = False,
) -> torch.Tensor:
    """Attention [.., heads, n, E] of queries that may have more heads than keys, with a mask that is added."""
    if rules.softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=rules.scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = q @ k.transpose(-1, -2) * rules.scaling
    scores = rules.softcap * torch.tanh(scores / rules.softcap)
    scores = scores if mask is None else scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pregate_step: StepLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in a backbone that is no lean decoder: attend `query` [1, Q, T, E] to our cache, after
    storing `key`, `value` [1, G, T, E]; returns [1, T, Q, E]. Raises UserError as `AttentionRules.of`."""
    rules = AttentionRules.of(module, query.shape[-1], attention_mask, **kwargs)
    if pregate_step is None:
        raise UserError(f"{type(module).__name__} is not handed the arguments that its model is called with")
    layer = int(module.layer_idx)  # pyright: ignore[reportArgumentType]
    q_TQE, k_TGE, v_TGE = (part[0].transpose(0, 1) for part in (query, key, value))
    return attend(pregate_step, layer, q_TQE, k_TGE, v_TGE, rules)[None], None


def register_attention() -> None:
    """Make `ATTENTION_NAME` known to transformers (idempotent)."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)


def run_step(
    model: Any, ids_T: torch.Tensor, positions_T: torch.Tensor, step: StepLayout, wanted_B: torch.Tensor
) -> torch.Tensor:
    """Run a step's tokens [T] through a causal language model that has this attention: logits [B, V] of the rows
    `wanted`."""
    output = model(
        input_ids=ids_T[None],
        position_ids=positions_T[None],
        use_cache=False,
        logits_to_keep=wanted_B,
        pregate_step=step,
    )
    return output.logits[0]
