"""The paged tensors of the KV cache; blocks.py says who owns which blocks.

Shape letters: T new tokens, N blocks, S tokens of a block, B sequences, C context tokens, G key/value heads, E head
width.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from pregate.kernels import step


class PagedKV:
    """Keys and values of all sequences, made at once: per layer [N * S, G, E] of each.

    `shapes` has (G, E) of every layer's keys and of its values. Nothing in the cache is ever infinite or not a number:
    what is masked is still multiplied, by 0, and one request's overflow must not reach another's text.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        shapes: Sequence[tuple[tuple[int, int], tuple[int, int]]],
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_slots = num_blocks * block_size
        self.keys, self.values = (
            [_zeros((self.num_slots, *shape[which]), dtype, device) for shape in shapes] for which in (0, 1)
        )
        #: The kernels that serve this cache, and its keys and values by layer as they read them; None where torch's
        #: operations do.
        self.kernels = step.step_kernels(device, dtype)
        self.arrays: list[tuple[np.ndarray, np.ndarray]] = []
        if self.kernels is not None:
            self.arrays = [(k.numpy(), v.numpy()) for k, v in zip(self.keys, self.values, strict=True)]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.keys, *self.values))

    def write(self, layer: int, slot_T: torch.Tensor, k_TGE: torch.Tensor, v_TGE: torch.Tensor) -> None:
        """Store keys and values [T, G, E] of new tokens in their slots; what is not finite as 0."""
        self.keys[layer].index_copy_(0, slot_T, k_TGE.nan_to_num(0.0, 0.0, 0.0))
        self.values[layer].index_copy_(0, slot_T, v_TGE.nan_to_num(0.0, 0.0, 0.0))

    def lanes(self, layer: int, first: int, stride: int, num: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """View [num, length, G, E] of keys and values: `num` runs of `length` slots that begin `stride` apart."""
        return tuple(  # pyright: ignore[reportReturnType]
            part.as_strided(
                (num, length, *part.shape[1:]),
                (stride * part.stride(0), *part.stride()),
                first * part.stride(0),
            )
            for part in (self.keys[layer], self.values[layer])
        )

    def gather(self, layer: int, block_N: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies [num, C, G, E] of keys and values: `block_N` names the blocks of `num` sequences, as many of each."""
        return tuple(  # pyright: ignore[reportReturnType]
            part.view(self.num_blocks, -1).index_select(0, block_N).view(num, -1, *part.shape[1:])
            for part in (self.keys[layer], self.values[layer])
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros that on a CPU take memory page by page as they are written: torch writes its own at once, and NumPy asks
    for huge pages, of which a sequence's first token would clear one in every layer."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
