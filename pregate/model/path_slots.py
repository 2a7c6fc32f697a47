"""`PathSlots`: the path router's state of many sequences in one block of memory, extended by one token each at a time.

A sequence has a slot; its last `window` tokens' keys and values lie there in a ring, token n in place n mod window. So
one step moves nothing that was there before, whatever sequences it is of.

Shape letters: B sequences of a step, S slots, W window, M keys and values of each block in turn, C router width, H
heads, c = C / H, L layers, K experts of a token, J offsets (`share_control.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from pregate.model.path_computer import PathComputer, PathState
from pregate.model.path_router import RouterBlock, margins
from pregate.model.paths import Paths


class PathSlots:
    """Extends sequences that `computer` has begun. The paths are those that it would give: both compute in float64 and
    round the scores (`SCORE_BITS`)."""

    def __init__(self, computer: PathComputer, num_slots: int = 16) -> None:
        self._computer, self._router = computer, computer.router
        config = computer.config
        self._window = config.window
        shape = (num_slots, config.window, 2 * config.num_blocks, config.dim)
        self._kept_SWMC = torch.zeros(shape, dtype=torch.float64, device=computer.device)
        counts = (num_slots, computer.num_counts)
        self._counts_SJ1 = torch.zeros(counts, dtype=torch.int64, device=computer.device)
        self._lengths = np.zeros(num_slots, dtype=np.int64)
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_used(self) -> int:
        return len(self._lengths) - len(self._free)

    def put(self, state: PathState, num_tokens: int) -> int:
        """Take in a sequence of `num_tokens` tokens that left `state`; return its slot."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        place = torch.arange(num_tokens - state.length, num_tokens, device=state.kept.device) % self._window
        self._kept_SWMC[slot].index_copy_(0, place, state.kept)
        self._counts_SJ1[slot] = state.counts
        self._lengths[slot] = num_tokens
        return slot

    def release(self, slot: int) -> None:
        self._free.append(slot)
        assert len(set(self._free)) == len(self._free), "a slot was released twice"

    def _grow(self) -> None:
        num = len(self._lengths)
        self._kept_SWMC = torch.cat([self._kept_SWMC, torch.zeros_like(self._kept_SWMC)])
        self._counts_SJ1 = torch.cat([self._counts_SJ1, torch.zeros_like(self._counts_SJ1)])
        self._lengths = np.concatenate([self._lengths, np.zeros(num, dtype=np.int64)])
        self._free += range(2 * num - 1, num - 1, -1)

    @torch.inference_mode()
    def extend(self, slots: Sequence[int], token_ids: Sequence[int]) -> Paths:
        """Append one token to the sequence of each slot; return the tokens' paths [B, L, K]."""
        slot_B = np.asarray(slots, dtype=np.int64)
        length_B = self._lengths[slot_B]
        self._lengths[slot_B] += 1
        packed = np.stack([slot_B, length_B, np.asarray(token_ids, dtype=np.int64)])
        slot, length, ids_B = torch.from_numpy(packed).to(self._kept_SWMC.device)
        place_B = length % self._window
        # How far back each place of the ring lies; what would lie before the text's beginning is hidden.
        distance_BW = (place_B[:, None] - torch.arange(self._window, device=slot.device)) % self._window
        hidden_BW = distance_BW > length[:, None]
        x_BC = self._router.embedding(ids_B)
        for index, block in enumerate(self._router.blocks):
            assert isinstance(block, RouterBlock)
            x_BC = self._block(block, x_BC, 2 * index, slot, place_B, distance_BW, hidden_BW)
        scores_BS = self._router.scores_of(self._router.heads(self._router.norm(x_BC)))
        seen_BJ1 = self._counts_SJ1[slot]
        if (control := self._router.share_control) is not None:
            self._counts_SJ1[slot] = seen_BJ1 + control.counts(margins(self._router, scores_BS))
        return self._computer.paths_of(scores_BS, seen_BJ1)

    def _block(
        self,
        block: RouterBlock,
        x_BC: torch.Tensor,
        first: int,
        slot_B: torch.Tensor,
        place_B: torch.Tensor,
        distance_BW: torch.Tensor,
        hidden_BW: torch.Tensor,
    ) -> torch.Tensor:
        """What `RouterBlock.forward` computes, for one new token a sequence."""
        q_BC, k_BC, v_BC = block.qkv(block.attention_norm(x_BC)).chunk(3, dim=-1)
        self._kept_SWMC[slot_B, place_B, first : first + 2] = torch.stack([k_BC, v_BC], dim=1)
        k_BHWc, v_BHWc = (
            self._kept_SWMC[:, :, first + n]
            .index_select(0, slot_B)
            .unflatten(-1, (block.num_heads, -1))
            .transpose(1, 2)
            for n in (0, 1)
        )
        bias_BHW = block.distance_bias[:, distance_BW].transpose(0, 1).masked_fill(hidden_BW[:, None], -torch.inf)
        q_BH1c = q_BC.unflatten(-1, (block.num_heads, 1, -1))
        mixed = F.scaled_dot_product_attention(q_BH1c, k_BHWc, v_BHWc, attn_mask=bias_BHW[:, :, None])
        x_BC = x_BC + block.output(mixed.flatten(1))
        return x_BC + block.down(F.silu(block.up(block.mlp_norm(x_BC))))
