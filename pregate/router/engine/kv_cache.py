"""The paged tensors of the KV cache; blocks.py says who owns which slots."""

from __future__ import annotations

import torch


class PagedKV:
    """Keys and values of all sequences: per layer [num_slots + 1, num_kv_heads, head_dim], made on first write.

    The slot after the last, `spare_slot`, is nobody's and stays 0: what is read as padding must not be what another
    request wrote, since masked does not mean harmless (weight 0 times infinity is not a number).
    """

    def __init__(self, num_slots: int) -> None:
        self.spare_slot = num_slots
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(self, layer: int, slot_T: torch.Tensor, k_TGE: torch.Tensor, v_TGE: torch.Tensor) -> None:
        """Store the new tokens' keys and values [T, kv heads, head dim] in their slots."""
        if layer not in self._layers:
            keys = k_TGE.new_zeros(self.spare_slot + 1, *k_TGE.shape[1:])
            self._layers[layer] = (keys, v_TGE.new_zeros(self.spare_slot + 1, *v_TGE.shape[1:]))
        keys, values = self._layers[layer]
        keys[slot_T] = k_TGE
        values[slot_T] = v_TGE

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather keys and values at `slots` (any shape); returns [*slots.shape, kv heads, head dim] of each."""
        keys, values = self._layers[layer]
        return keys[slots], values[slots]
