"""A layer whose experts are narrow, once more as one wide FFN on packed weights: what a token did not choose is masked.

Products this small cost more than their numbers: at a few rows that visit most experts anyway, one product over all of
them is faster than one for each (benchmarks/results/whole_layers.json, docs/measurements.md).

Shape letters: L layers, T tokens, K experts per token, R routed experts, M expert width, S M shared width, D hidden
width.
"""

from __future__ import annotations

import numpy as np
import torch

from pregate.kernels.contract import Pair
from pregate.kernels.cpu.packed import PackedFFN, product_of
from pregate.kernels.reference import activation

#: Experts of more values per matrix than this are wide enough for products of their own.
MAX_VALUES = 1 << 18


class WholeLayer:
    """`shared` is gate_up [2 S M, D] (gate rows first) and down [D, S M]; `routed` are [R, 2M, D] and [R, D, M]."""

    def __init__(self, act: str, shared: Pair | None, routed: Pair, dtype: torch.dtype) -> None:
        gate_up_RMD, down_RDM = (part.to(dtype) for part in routed)
        gates, ups = ([half.flatten(0, 1)] for half in gate_up_RMD.chunk(2, dim=1))
        downs = [down_RDM.transpose(0, 1).flatten(1)]
        self._first = 0
        if shared is not None:
            for parts, part in zip((gates, ups, downs), (*shared[0].chunk(2), shared[1]), strict=True):
                parts.insert(0, part.to(dtype))
            self._first = shared[1].shape[1]
        self._act, self.num_routed = activation(act), len(down_RDM)
        self._gate_up, self._down = product_of(torch.cat(gates + ups)), product_of(torch.cat(downs, dim=1))

    @staticmethod
    def why_not(width: int, hidden: int, dtype: torch.dtype) -> str:
        """Why such experts should not be held like this; empty if they should."""
        if width * hidden > MAX_VALUES:
            return f"experts of {width} x {hidden} gain nothing"
        return PackedFFN.why_not(dtype, (width, hidden))

    @staticmethod
    def max_rows(num_shared: int, num_active: int, num_routed: int) -> int:
        """Up to how many rows it pays, from 2 on: about 32 where three quarters run, none where a quarter does."""
        return int(64 * ((num_shared + num_active) / (num_shared + num_routed) - 0.25))

    def run(self, x_TD: torch.Tensor, absent_TR: torch.Tensor, weights_TR: torch.Tensor | None) -> torch.Tensor:
        """Return [T, D], the sum over each token's units; `absent_TR` is true where it has not chosen an expert."""
        gate, up = self._gate_up(x_TD).chunk(2, dim=-1)
        h_TM = self._act(gate).mul_(up)
        routed_TRM = h_TM[:, self._first :].unflatten(1, (self.num_routed, -1))
        if weights_TR is not None:
            routed_TRM.mul_(weights_TR[..., None])
        # Not times 0: what overflows in an expert that was not chosen must not be seen.
        routed_TRM.masked_fill_(absent_TR[..., None], 0.0)
        return self._down(h_TM)


def absent(ids_TLK: np.ndarray, num_routed: int) -> torch.Tensor:
    """bool [L, T, R]: which experts are not among a token's ids (-1 for none)."""
    return torch.from_numpy(_by_expert(ids_TLK, num_routed, False, elsewhere=np.True_))


def spread(ids_TLK: np.ndarray, weights_TLK: np.ndarray, num_routed: int, dtype: torch.dtype) -> torch.Tensor:
    """[L, T, R]: each expert's weight in a token's sum, where it is among its ids."""
    return torch.from_numpy(_by_expert(ids_TLK, num_routed, weights_TLK, elsewhere=np.float32(0))).to(dtype)


def _by_expert(
    ids_TLK: np.ndarray, num_routed: int, values_TLK: np.ndarray | bool, elsewhere: np.generic
) -> np.ndarray:
    """[L, T, R] of the type of `elsewhere`: each id's value at its expert, `elsewhere` at the others."""
    ids_LTK = np.where(ids_TLK < 0, num_routed, ids_TLK).astype(np.int64).transpose(1, 0, 2)
    found = np.full((*ids_LTK.shape[:2], num_routed + 1), elsewhere)
    values_LTK = np.broadcast_to(values_TLK, ids_TLK.shape).transpose(1, 0, 2)
    np.put_along_axis(found, ids_LTK, values_LTK, axis=2)
    return found[..., :num_routed]
