"""The attention function transformers calls in a backbone: reads our paged KV cache, many sequences per step.

One step is one row of tokens [1, T]: first the decode tokens (one per sequence), then the prompt chunks end to end.

Shape letters: T new tokens, B decoding sequences, C context tokens, Q heads, G key/value heads, E head width.
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
from pregate.router.engine.kv_cache import PagedKV

ATTENTION_NAME = "pregate_paged"
#: Arguments transformers passes along that change nothing for us: positions are in the rotary embedding already.
_HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "output_attentions"})


@dataclass(frozen=True)
class PromptChunk:
    """Rows row_start .. row_start + n - 1 of the step: a chunk whose context (itself included) is `slots_C`."""

    row_start: int
    num_rows: int
    slots_C: torch.Tensor


@dataclass(frozen=True)
class StepLayout:
    """Which rows of a step belong to which sequence, and where their context lies in the KV cache.

    `slot_T`: the new tokens' slots. `decode_slots_BC`: context slots of each decoding sequence, padded with the cache's
    spare one; `context_len_B`: how many of them are real, the new token included.
    """

    kv: PagedKV
    slot_T: torch.Tensor
    decode_slots_BC: torch.Tensor
    context_len_B: torch.Tensor
    chunks: tuple[PromptChunk, ...]

    @classmethod
    def build(
        cls, kv: PagedKV, decodes: list[np.ndarray], chunks: list[tuple[int, np.ndarray]], device: str = "cpu"
    ) -> StepLayout:
        """Lay out `decodes` (context slots of each) followed by `chunks` (number of new rows, context slots)."""
        lengths = [len(d) for d in decodes]
        padded = np.full((len(decodes), max(lengths, default=0)), kv.spare_slot, dtype=np.int64)
        for row, slots in zip(padded, decodes, strict=True):
            row[: len(slots)] = slots
        new = [d[-1:] for d in decodes] + [slots[-n:] for n, slots in chunks]
        laid, row = [], len(decodes)
        for n, slots in chunks:
            laid.append(PromptChunk(row, n, torch.from_numpy(slots).to(device)))
            row += n
        slot_T = torch.from_numpy(np.concatenate(new)).to(device)
        length_B = torch.tensor(lengths, dtype=torch.int64, device=device)
        return cls(kv, slot_T, torch.from_numpy(padded).to(device), length_B, tuple(laid))


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    pregate_step: StepLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend `query` [1, Q, T, E] to our cache, after storing `key`, `value` [1, G, T, E]; returns [1, T, Q, E].

    Raises UserError for any argument that is set and unknown, so that no family is served wrongly in silence.
    """
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS and v is not False)
    if unknown or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
        what = ", ".join(unknown) or "a mask, dropout or attention that is not causal"
        raise UserError(f"{type(module).__name__} asks attention for {what}; pregate does not know how to serve that")
    if pregate_step is None:
        raise UserError(f"{type(module).__name__} is not handed the arguments that its model is called with")
    layer = int(module.layer_idx)  # pyright: ignore[reportArgumentType]
    step = pregate_step
    step.kv.write(layer, step.slot_T, key[0].transpose(0, 1), value[0].transpose(0, 1))
    rules = _Rules(scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window, softcap)
    parts = []
    if len(step.context_len_B):
        parts.append(_decode(step, layer, query[0, :, : len(step.context_len_B)], rules))
    for chunk in step.chunks:
        rows_QNE = query[0, :, chunk.row_start : chunk.row_start + chunk.num_rows]
        parts.append(_prompt(step, layer, chunk, rows_QNE, rules))
    return torch.cat(parts)[None], None


@dataclass(frozen=True)
class _Rules:
    scaling: float
    sliding_window: int | None
    softcap: float | None

    def visible(self, distance: torch.Tensor) -> torch.Tensor:
        """True where a key `distance` tokens back may be seen."""
        seen = distance >= 0
        return seen if self.sliding_window is None else seen & (distance < self.sliding_window)


def _decode(step: StepLayout, layer: int, q_QBE: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """One new token per sequence, all sequences at once; returns [B, Q, E]."""
    k_BCGE, v_BCGE = step.kv.read(layer, step.decode_slots_BC)
    position = torch.arange(k_BCGE.shape[1], device=k_BCGE.device)
    distance_BC = (step.context_len_B - 1)[:, None] - position[None]
    mask = rules.visible(distance_BC)[:, None, None]
    q = q_QBE.transpose(0, 1)[:, :, None]
    return _attend(q, k_BCGE.transpose(1, 2), v_BCGE.transpose(1, 2), mask, rules)[:, :, 0]


def _prompt(step: StepLayout, layer: int, chunk: PromptChunk, q_QNE: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """A chunk of one prompt against its whole context so far; returns [n, Q, E]."""
    k_CGE, v_CGE = step.kv.read(layer, chunk.slots_C)
    num_context = k_CGE.shape[0]
    position = torch.arange(num_context, device=k_CGE.device)
    mask = rules.visible(position[-chunk.num_rows :, None] - position[None])[None, None]
    out = _attend(q_QNE[None], k_CGE.transpose(0, 1)[None], v_CGE.transpose(0, 1)[None], mask, rules)
    return out[0].transpose(0, 1)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """Grouped-query attention [.., Q, n, E] with a boolean mask; softcap as in Gemma 2: cap * tanh(score / cap)."""
    if rules.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rules.scaling, enable_gqa=True)
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = q @ k.transpose(-1, -2) * rules.scaling
    scores = rules.softcap * torch.tanh(scores / rules.softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


def register_attention() -> None:
    """Make `ATTENTION_NAME` known to transformers (idempotent)."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
