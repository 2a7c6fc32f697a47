"""The expert FFN on a CPU with weights packed at load: oneDNN products in fp32 or bf16, and dynamic int8.

With AVX2 `grouped_mm` wins from two rows up and the loop for one; packing wins only between 2 and 16. With AVX-512
packing wins everywhere: MKL, which the others run on, leaves half of it unused (benchmarks/results/kernels.json,
docs/measurements.md).

Shape letters: T tokens, N rows of an expert, D hidden width, M expert width, K columns of any weight matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from pregate.kernels.cpu.ffn import LoopFFN, fault_of
from pregate.kernels.weights import Layout, quantise_rows


@dataclass(frozen=True, eq=False)
class PackedWeights:
    """Experts in a form that only their product can read: lists over slots, None where nothing was put."""

    gate_up: list[Any]
    down: list[Any]
    slot_bytes: int

    @property
    def num_slots(self) -> int:
        return len(self.down)


class PackedLayout(Layout):
    """Each matrix packed by `pack`, `item_bytes` per value."""

    def __init__(self, pack: Callable[[torch.Tensor], Any], item_bytes: int) -> None:
        self._pack, self._item_bytes = pack, item_bytes

    def allocate(self, num_slots: int, width: int, hidden: int) -> PackedWeights:
        return PackedWeights([None] * num_slots, [None] * num_slots, 3 * width * hidden * self._item_bytes)

    def put(self, weights: PackedWeights, slot: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        weights.gate_up[slot], weights.down[slot] = self._pack(gate_up), self._pack(down)

    def move(self, old: PackedWeights, old_slot: int, new: PackedWeights, new_slot: int) -> None:
        """Let a slot share what another holds; packed weights are never written again."""
        new.gate_up[new_slot], new.down[new_slot] = old.gate_up[old_slot], old.down[old_slot]


class PackedFFN(LoopFFN):
    """oneDNN products whose weights were reordered at load: one product per expert and half."""

    name = "packed"

    def __init__(self, act: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(act, dtype)
        self.layout = PackedLayout(lambda matrix: pack_linear(matrix.to(dtype)), dtype.itemsize)

    @classmethod
    def why_not(cls, dtype: torch.dtype, widths: Iterable[int]) -> str:
        ones = torch.ones(8, 8, dtype=dtype)
        return fault_of(f"packed linear for {dtype}", lambda: packed_linear(ones, pack_linear(ones)))

    def _expert(self, x_ND: torch.Tensor, weights: PackedWeights, slot: int) -> torch.Tensor:
        h_NM = self._gated(packed_linear(x_ND, weights.gate_up[slot]))
        return packed_linear(h_NM, weights.down[slot])


class Int8FFN(LoopFFN):
    """int8 weights and int8 rows, each with a scale of its own: a row's answer is the same bits whatever is beside it.

    Never chosen by "auto": it costs perplexity (benchmarks/results/quantised.json).
    """

    name = "int8"

    def __init__(self, act: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(act, dtype)
        self.layout = PackedLayout(pack_int8, 1)

    @classmethod
    def why_not(cls, dtype: torch.dtype, widths: Iterable[int]) -> str:
        if dtype != torch.float32:
            return f"dynamic int8 takes float32 rows, not {dtype}"
        ones = torch.ones(8, 8)
        return fault_of("dynamic int8 linear", lambda: torch.ops.quantized.linear_dynamic(ones, pack_int8(ones)))

    def _expert(self, x_ND: torch.Tensor, weights: PackedWeights, slot: int) -> torch.Tensor:
        h_NM = self._gated(int8_linear(x_ND, weights.gate_up[slot]))
        return int8_linear(h_NM, weights.down[slot])


def pack_linear(weight: torch.Tensor) -> torch.Tensor:
    """Return [N, K] in the order oneDNN likes best; opaque, a copy. What torch's compiler freezes linears to."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def packed_linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Return x [T, K] through weights of `pack_linear`: [T, N]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def pack_int8(weight: torch.Tensor) -> Any:
    """Return [N, K] quantised to int8, one scale per row, packed for `torch.ops.quantized.linear_dynamic`."""
    values, scale_N = quantise_rows(weight, torch.int8)
    zeros = torch.zeros(len(scale_N), dtype=torch.int64)
    with warnings.catch_warnings():
        # torch warns that its quantised tensor types will go; `Int8FFN.why_not` notices when they have.
        warnings.simplefilter("ignore")
        make = torch._make_per_channel_quantized_tensor  # pyright: ignore[reportPrivateImportUsage]
        quantised = make(values, scale_N.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(quantised, None)


def int8_linear(x_NK: torch.Tensor, packed: Any) -> torch.Tensor:
    """Return x [N, K] (K at least 2) through weights of `pack_int8`, every row rounded by its own largest value.

    torch takes one scale from all rows. Rows that reach to 1 at most, and one more that reaches from -1 to 1, always
    give it the same.
    """
    scale_N1 = x_NK.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    ends_1K = x_NK.new_zeros(1, x_NK.shape[1])
    ends_1K[0, 0], ends_1K[0, 1] = -1, 1
    rows = torch.cat([x_NK / scale_N1, ends_1K])
    return torch.ops.quantized.linear_dynamic(rows, packed)[:-1].mul_(scale_N1)
