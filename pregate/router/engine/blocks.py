"""Who owns which block of the KV cache. Pure bookkeeping: no torch.

A slot is one token's place in every layer; a block is `block_size` neighbouring slots. A sequence owns a list of
blocks; its token at position p lies in slot blocks[p // block_size] * block_size + p % block_size.
"""

from __future__ import annotations

import numpy as np


class BlockAllocator:
    """Hands out blocks 0 .. num_blocks - 1. A block is either free or owned by exactly one sequence."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"KV cache: {num_blocks} blocks of {block_size} slots; both must be 1 or more")
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_tokens: int) -> bool:
        return self.blocks_for(num_tokens) <= len(self._free)

    def allocate(self, num_tokens: int) -> list[int]:
        """Take blocks for `num_tokens` tokens; the caller has asked `can_allocate`."""
        count = self.blocks_for(num_tokens)
        assert count <= len(self._free), "allocate without can_allocate"
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: list[int]) -> None:
        """Give blocks back."""
        self._free += blocks
        assert len(self._free) <= self.num_blocks, "a block was released twice"

    def check_idle(self) -> None:
        """AssertionError unless every block is free exactly once: nothing is lost when nothing runs."""
        assert sorted(self._free) == list(range(self.num_blocks)), "KV blocks were lost or doubled"


def slots_of(blocks: list[int], start: int, stop: int, block_size: int) -> np.ndarray:
    """Slots int64 [stop - start] of positions start .. stop - 1. Example: blocks [5, 2], size 4, 3..5: [23, 8]."""
    position = np.arange(start, stop)
    return np.asarray(blocks, dtype=np.int64)[position // block_size] * block_size + position % block_size
