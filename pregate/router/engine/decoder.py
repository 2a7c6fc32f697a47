"""`LeanDecoder`: a decoder of the common shape, run with few and large operations in place of transformers' modules.

Data on its way: token ids [T] -> embeddings [T, D] -> per layer: norm, one product to queries, keys and values,
rotation, attention over the paged cache, product, residual; norm, FFN, residual -> the rows wanted [B, D] -> logits
[B, V].

Shape letters: T tokens, D hidden width, Q query heads, G key/value heads, E head width, B rows wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pregate.router.engine.attention import AttentionRules, attend, attend_joined
from pregate.router.engine.linear import Linear, Norm
from pregate.router.engine.step_layout import StepLayout

FFN = Callable[[torch.Tensor], torch.Tensor]
#: Cosines and sines [T, 1, E'] of a step, the first half of the sines negated: E' may be less than E.
Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LeanLayer:
    """One layer's parts. `post_attention_norm` and `post_ffn_norm` norm what is added to the residual, where a family
    has them (Gemma 2 and 3). `rotary` is which of the model's rotary tables it reads."""

    input_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    output: Linear
    post_attention_norm: Norm | None
    ffn_norm: Norm
    ffn: FFN
    post_ffn_norm: Norm | None
    num_heads: tuple[int, int]
    head_width: int
    rotary: int
    rules: AttentionRules

    def run(
        self, index: int, x_TD: torch.Tensor, out_TD: torch.Tensor | None, rotation: Any, step: StepLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the residual `x_TD`, to which the last layer's `out_TD` is still to be added; return both anew. `x_TD`
        may be written over."""
        if out_TD is None:
            normed_TD = self.input_norm(x_TD)
        else:
            x_TD, normed_TD = self.input_norm.after(x_TD, out_TD)
        heads_THE = self.qkv(normed_TD).view(len(x_TD), -1, self.head_width)
        mixed_TD = self.output(self._attend(index, heads_THE, rotation, step).reshape(len(x_TD), -1))
        if self.post_attention_norm is not None:
            mixed_TD = self.post_attention_norm(mixed_TD)
        x_TD, normed_TD = self.ffn_norm.after(x_TD, mixed_TD)
        out_TD = self.ffn(normed_TD)
        return x_TD, out_TD if self.post_ffn_norm is None else self.post_ffn_norm(out_TD)

    def _attend(self, index: int, heads_THE: torch.Tensor, rotation: Any, step: StepLayout) -> torch.Tensor:
        num_q, num_kv = self.num_heads
        if step.rows is not None:
            if self.q_norm is not None and self.k_norm is not None:
                heads_THE[:, :num_q] = self.q_norm(heads_THE[:, :num_q])
                heads_THE[:, num_q : num_q + num_kv] = self.k_norm(heads_THE[:, num_q : num_q + num_kv])
            return attend_joined(step, index, heads_THE, rotation, num_q, self.rules)
        if self.q_norm is None or self.k_norm is None:
            qk_THE = rotate(heads_THE[:, : num_q + num_kv], rotation)
            q_TQE, k_TGE = qk_THE[:, :num_q], qk_THE[:, num_q:]
        else:
            q_TQE = rotate(self.q_norm(heads_THE[:, :num_q]), rotation)
            k_TGE = rotate(self.k_norm(heads_THE[:, num_q : num_q + num_kv]), rotation)
        return attend(step, index, q_TQE, k_TGE, heads_THE[:, num_q + num_kv :], self.rules)


class LeanDecoder:
    """The parts of a whole decoder; see `decoder_parts.py` for where they come from."""

    def __init__(
        self,
        embedding: nn.Module,
        rotary: Sequence[Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]],
        layers: Sequence[LeanLayer],
        norm: Norm,
        head: Linear,
        logit_cap: float | None,
    ) -> None:
        self.embedding, self.rotary, self.layers = embedding, tuple(rotary), tuple(layers)
        self.norm, self.head, self.logit_cap = norm, head, logit_cap

    def forward(
        self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: StepLayout, wanted_B: torch.Tensor
    ) -> torch.Tensor:
        """Return logits [B, V] of the rows `wanted_B`."""
        x_TD = self.embedding(token_ids_T)
        rotations: list[Any] = [_signed(*table(x_TD[None], positions_T[None])) for table in self.rotary]
        if step.rows is not None:  # the kernels read arrays
            rotations = [tuple(part[:, 0].contiguous().numpy() for part in rotation) for rotation in rotations]
        out_TD = None
        for index, layer in enumerate(self.layers):
            x_TD, out_TD = layer.run(index, x_TD, out_TD, rotations[layer.rotary], step)
        assert out_TD is not None, "a decoder has layers"
        wanted_BD = x_TD.index_select(0, wanted_B) + out_TD.index_select(0, wanted_B)
        logits_BV = self.head(self.norm(wanted_BD))
        if self.logit_cap is None:
            return logits_BV
        return torch.tanh(logits_BV / self.logit_cap) * self.logit_cap


def _signed(cos: torch.Tensor, sin: torch.Tensor) -> Rotation:
    """A step's rotation from transformers' tables [1, T, E']; once per step, for all layers."""
    half = sin.shape[-1] // 2
    return cos[0, :, None], torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], dim=-1)


def rotate(x_THE: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """x cos + rotate_half(x) sin: the halves swap places, and the sign is in the sines. What is beyond E' stays."""
    cos, sin = rotation
    width = cos.shape[-1]
    if width == x_THE.shape[-1]:
        return torch.addcmul(x_THE * cos, x_THE.roll(width // 2, -1), sin)
    turned = x_THE[..., :width]
    return torch.cat([torch.addcmul(turned * cos, turned.roll(width // 2, -1), sin), x_THE[..., width:]], dim=-1)
