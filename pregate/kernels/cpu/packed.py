"""The expert FFN on a CPU with weights packed at load: products in fp32 or bf16, and dynamic int8.

A matrix whose values fp16 holds is kept in fp16 and multiplied in fp32 by FBGEMM: weights of checkpoints in 16 bits
lose nothing, take half the bytes, and at a few rows, where reading weights is the cost, half the time. Others are
packed for oneDNN. With AVX2 `grouped_mm` on unpacked weights wins over oneDNN from two rows up, the loop for one; with
AVX-512 packing always wins: MKL, which the others run on, leaves half of it unused (docs/measurements.md).

Shape letters: T tokens, N rows of an expert, D hidden width, M expert width, K columns of any weight matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from pregate.kernels.cpu.ffn import LoopFFN, fault_of
from pregate.kernels.cpu.segments import CpuSegment
from pregate.kernels.weights import Layout, quantise_rows

#: x [T, K] -> [T, N], with the weights [N, K] inside.
Product = Callable[[torch.Tensor], torch.Tensor]
#: How far fp16 may move a value, over the matrix's largest: as far as sums of fp32 differ by their order.
FP16_TOLERANCE = 2.0**-20
#: From so many rows of all experts on, gathering and joining them costs more than the calls it saves.
MANY_ROWS = 256


@dataclass(frozen=True, eq=False)
class PackedWeights:
    """Experts as products: lists over slots, None where nothing was put. `slot_bytes` is what a slot takes at most."""

    gate_up: list[Any]
    down: list[Any]
    slot_bytes: int

    @property
    def num_slots(self) -> int:
        return len(self.down)


class PackedLayout(Layout):
    """Each matrix made a product by `pack`, `item_bytes` per value."""

    def __init__(self, pack: Callable[[torch.Tensor], Product], item_bytes: int) -> None:
        self._pack, self._item_bytes = pack, item_bytes

    def allocate(self, num_slots: int, width: int, hidden: int) -> PackedWeights:
        return PackedWeights([None] * num_slots, [None] * num_slots, 3 * width * hidden * self._item_bytes)

    def put(self, weights: PackedWeights, slot: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        weights.gate_up[slot], weights.down[slot] = self._pack(gate_up), self._pack(down)

    def move(self, old: PackedWeights, old_slot: int, new: PackedWeights, new_slot: int) -> None:
        """Let a slot share what another holds; packed weights are never written again."""
        new.gate_up[new_slot], new.down[new_slot] = old.gate_up[old_slot], old.down[old_slot]


class PackedFFN(LoopFFN):
    """Weights reordered at load: one product per expert and half."""

    name = "packed"

    def __init__(self, act: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(act, dtype)
        self.layout = PackedLayout(lambda matrix: product_of(matrix.to(dtype)), dtype.itemsize)

    @classmethod
    def why_not(cls, dtype: torch.dtype, widths: Iterable[int]) -> str:
        ones = _ones(dtype)
        return fault_of(f"packed linear for {dtype}", lambda: onednn_product(ones)(ones))

    def _expert(self, x_ND: torch.Tensor, weights: PackedWeights, slot: int) -> torch.Tensor:
        return weights.down[slot](self._gated(weights.gate_up[slot](x_ND)))

    def _add_rows(
        self, out_TD: torch.Tensor, x_TD: torch.Tensor, segment: CpuSegment, slots: list[int], weights: PackedWeights
    ) -> torch.Tensor:
        """For many rows one expert after another: what is gathered and computed of one is still in the cache."""
        assert segment.tokens is not None
        if len(segment.tokens) < MANY_ROWS:
            return super()._add_rows(out_TD, x_TD, segment, slots, weights)
        of_expert = segment.tokens.split(segment.counts)
        scales = [None] * len(slots) if segment.weights is None else segment.weights.split(segment.counts)
        for slot, tokens_N, scale_N1 in zip(slots, of_expert, scales, strict=True):
            y_ND = self._expert(x_TD.index_select(0, tokens_N), weights, slot)
            out_TD.index_add_(0, tokens_N, y_ND if scale_N1 is None else y_ND * scale_N1.to(y_ND.dtype))
        return out_TD

    def _run(self, x_PD: torch.Tensor, slots: list[int], counts: list[int], weights: PackedWeights) -> torch.Tensor:
        """All experts' rows are gated at once: for few rows three small operations cost as much as a product."""
        if len(slots) == 1:
            return self._expert(x_PD, weights, slots[0])
        gate_up = [weights.gate_up[n](x_ND) for n, x_ND in zip(slots, x_PD.split(counts), strict=True)]
        h_PM = self._gated(torch.cat(gate_up))
        return torch.cat([weights.down[n](h_NM) for n, h_NM in zip(slots, h_PM.split(counts), strict=True)])


class Int8FFN(PackedFFN):
    """int8 weights and int8 rows, each with a scale of its own: a row's answer is the same bits whatever is beside it.

    Never chosen by "auto": it costs perplexity (benchmarks/results/quantised.json).
    """

    name = "int8"

    def __init__(self, act: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(act, dtype)
        self.layout = PackedLayout(lambda matrix: partial(int8_linear, packed=pack_int8(matrix)), 1)

    @classmethod
    def why_not(cls, dtype: torch.dtype, widths: Iterable[int]) -> str:
        if dtype != torch.float32:
            return f"dynamic int8 takes float32 rows, not {dtype}"
        ones = torch.ones(8, 8)
        return fault_of("dynamic int8 linear", lambda: torch.ops.quantized.linear_dynamic(ones, pack_int8(ones)))


def product_of(weight_NK: torch.Tensor) -> Product:
    """Return the fastest exact product of a weight for this CPU; it holds a copy."""
    if weight_NK.dtype == torch.float32 and not why_no_fp16() and fits_fp16(weight_NK):
        return fp16_product(weight_NK)
    return onednn_product(weight_NK)


def fits_fp16(weight: torch.Tensor) -> bool:
    """Whether fp16 holds a weight as well as its products need: bf16 values of the usual size, fp16 values."""
    # In one dtype and in place: torch's loops over two dtypes took five times as long, a third of a unit's load.
    moved = weight.half().float().sub_(weight).abs_().amax()
    smallest, largest = weight.aminmax()
    largest = torch.maximum(-smallest, largest)
    return bool(moved <= FP16_TOLERANCE * largest) and bool(largest.isfinite())


def packs_to_fp16(implementation: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights whose values fp16 holds, and that stay, take 16 bits where they are computed in this dtype."""
    here = device.type == "cpu" and implementation in ("auto", PackedFFN.name)
    return here and dtype == torch.float32 and not why_no_fp16()


def onednn_product(weight_NK: torch.Tensor) -> Product:
    """A weight in the order oneDNN likes best. What torch's compiler freezes linears to."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous())
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x_TK: multiply(x_TK, packed, None, "none", [], "")


def fp16_product(weight_NK: torch.Tensor) -> Product:
    """A weight in fp16, in the order FBGEMM reads; rows and sums are fp32."""
    return _fbgemm()(weight_NK.contiguous())


@cache
def why_no_fp16() -> str:
    """Why this torch and CPU cannot multiply by fp16 weights; empty if they can."""
    return fault_of("product with fp16 weights", lambda: fp16_product(_ones())(_ones()))


@cache
def _fbgemm() -> Callable[[torch.Tensor], Product]:
    """What makes a product of FBGEMM. AttributeError, RuntimeError or NotImplementedError where torch has neither form.

    The older one costs a tenth to call; torch says that it will go.
    """

    def older(weight_NK: torch.Tensor) -> Product:
        packed = torch.fbgemm_pack_gemm_matrix_fp16(weight_NK)
        multiply: Any = torch.fbgemm_linear_fp16_weight_fp32_activation
        return lambda x_TK: multiply(x_TK, packed, None)

    def newer(weight_NK: torch.Tensor) -> Product:
        packed = torch.ops.quantized.linear_prepack_fp16(weight_NK, None)
        multiply = torch.ops.quantized.linear_dynamic_fp16
        return lambda x_TK: multiply(x_TK, packed)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said at the first call only
        try:
            older(_ones())(_ones())
        except (AttributeError, RuntimeError, TypeError):
            return newer
    return older


def _ones(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(8, 8, dtype=dtype)


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
