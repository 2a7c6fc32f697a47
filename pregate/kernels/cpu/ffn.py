"""The expert FFN on a CPU: a loop over experts, and `grouped_mm` over expert-sorted rows.

Both do what `reference.expert_ffn` does for each expert's rows, with the same operations.

Shape letters: T tokens, N rows of a group, P (row, unit) pairs, D hidden width, M expert width, S slots, U units used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from pregate.base.dtypes import dtype_name
from pregate.kernels.contract import ExpertFFN, Pair
from pregate.kernels.cpu.segments import CpuSegment, CpuSegments
from pregate.kernels.reference import Activation, activation
from pregate.kernels.units import GroupRows, LayerUnits, check_present
from pregate.kernels.weights import PlainLayout, TransposedLayout

GroupedMM = Callable[..., torch.Tensor]
#: `grouped_mm` wants every row to start on a 16-byte boundary.
ROW_ALIGNMENT_BYTES = 16
#: `grouped_mm` walks all slots between the first visited and the last; beyond this many for each, the loop is faster.
MAX_GAPS = 8
CPU = torch.device("cpu")


class LoopFFN(ExpertFFN):
    """One matrix product per expert and half, with the reference's own operations. The base of the others.

    Segments hold routed units only: one wide product serves the shared expert better.
    """

    name = "loop"

    def __init__(self, act: str, dtype: torch.dtype = torch.float32) -> None:
        self._act: Activation = activation(act)
        self.layout = PlainLayout(dtype, CPU)

    @classmethod
    def why_not(cls, dtype: torch.dtype, widths: Iterable[int]) -> str:
        """Return why it cannot serve matrices with these row lengths on this CPU; empty if it can."""
        return ""

    def block_m(self, num_rows: int, num_units: int) -> int:
        return max(num_rows, 1)  # nothing here reads tiles

    def units(
        self, shared: Pair | None, num_shared: int, gate_up_RMD: torch.Tensor, down_RDM: torch.Tensor
    ) -> LayerUnits:
        num_routed = down_RDM.shape[0]
        wide = None if shared is None else partial(self.dense, weights=self.stack(shared[0][None], shared[1][None]))
        routed = self.stack(gate_up_RMD, down_RDM)
        return LayerUnits(routed, np.arange(num_routed, dtype=np.int32), wide)

    def segments(
        self, ids_TLK: torch.Tensor, num_routed: int, num_shared: int, weights_TLK: torch.Tensor | None = None
    ) -> CpuSegments:
        return CpuSegments(ids_TLK, num_routed, weights_TLK)

    def prepare(self, groups: Sequence[GroupRows]) -> list[GroupRows]:
        for rows in groups:
            rows.derive()
        return list(groups)

    def pairs(self, x_ND: torch.Tensor, rows: GroupRows, weights: Any) -> torch.Tensor:
        whole = len(rows.row_index) == x_ND.shape[0] and rows.in_order
        x_PD = x_ND if whole else x_ND.index_select(0, rows.index)
        return self._run(x_PD, rows.slot_list, rows.count_list, weights)

    def dense(self, x_TD: torch.Tensor, weights: Any) -> torch.Tensor:
        return self._expert(x_TD, weights, 0)

    def layer(self, x_TD: torch.Tensor, segment: CpuSegment, units: LayerUnits) -> torch.Tensor:
        """Return [T, D]: the shared expert first, then each token's routed ones in ascending unit order."""
        units.check_sizes(segment.num_units, segment.num_tokens, x_TD.shape[0])
        out_TD = torch.zeros_like(x_TD) if units.shared is None else units.shared(x_TD)
        if not segment.units:
            return out_TD
        of_unit = units.slot_list
        slots = [of_unit[unit] for unit in segment.units]
        if min(slots) < 0:
            check_present(units.unit_slot, np.bincount(segment.units, minlength=segment.num_units))
        if segment.tokens is None:
            return self._add_all(out_TD, x_TD, slots, units.weights)
        return self._add_rows(out_TD, x_TD, segment, slots, units.weights)

    def _add_all(self, out_TD: torch.Tensor, x_TD: torch.Tensor, slots: list[int], weights: Any) -> torch.Tensor:
        """Add what each expert in `slots` makes of all rows, in their order."""
        for slot in slots:
            out_TD += self._expert(x_TD, weights, slot)
        return out_TD

    def _add_rows(
        self, out_TD: torch.Tensor, x_TD: torch.Tensor, segment: CpuSegment, slots: list[int], weights: Any
    ) -> torch.Tensor:
        """Add what the experts in `slots` make of each token's row, in their order."""
        assert segment.tokens is not None
        y_PD = self._run(x_TD.index_select(0, segment.tokens), slots, segment.counts, weights)
        if segment.weights is not None:
            y_PD = y_PD * segment.weights.to(y_PD.dtype)
        return out_TD.index_add_(0, segment.tokens, y_PD)

    def _run(self, x_PD: torch.Tensor, slots: list[int], counts: list[int], weights: Any) -> torch.Tensor:
        """Return [P, D]: sorted rows `x_PD`, `counts[i]` of them through the expert in `slots[i]`."""
        pieces = [self._expert(x_ND, weights, slot) for x_ND, slot in zip(x_PD.split(counts), slots, strict=True)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _expert(self, x_ND: torch.Tensor, weights: Any, slot: int) -> torch.Tensor:
        h_NM = self._gated(torch.mm(x_ND, weights.gate_up_SMD[slot].t()))
        return torch.mm(h_NM, weights.down_SDM[slot].t())

    def _gated(self, gate_up_NM: torch.Tensor) -> torch.Tensor:
        gate_NM, up_NM = gate_up_NM.chunk(2, dim=-1)
        return self._act(gate_NM).mul_(up_NM)


class GroupedFFN(LoopFFN):
    """`grouped_mm` over all experts at once; the loop where every expert has a single row. Weights lie transposed."""

    name = "grouped"

    def __init__(self, act: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(act, dtype)
        self.layout = TransposedLayout(dtype, CPU)
        self._grouped_mm = grouped_mm()

    @classmethod
    def why_not(cls, dtype: torch.dtype, widths: Iterable[int]) -> str:
        for width in widths:
            if width * dtype.itemsize % ROW_ALIGNMENT_BYTES:
                return f"rows of {width} {dtype} values do not start on {ROW_ALIGNMENT_BYTES}-byte boundaries"
        probe, weight, ends = torch.ones(2, 8, dtype=dtype), torch.ones(1, 8, 8, dtype=dtype), torch.tensor([2])
        return fault_of(f"grouped_mm for {dtype}", lambda: grouped_mm()(probe, weight, offs=ends.int()))

    def _run(self, x_PD: torch.Tensor, slots: list[int], counts: list[int], weights: Any) -> torch.Tensor:
        if len(slots) == 1 or len(x_PD) == len(slots):
            return super()._run(x_PD, slots, counts, weights)
        first, stop = min(slots), max(slots) + 1
        if stop - first > MAX_GAPS * len(slots):
            return super()._run(x_PD, slots, counts, weights)
        if any(slot > after for slot, after in pairwise(slots)):
            return self._in_slot_order(x_PD, slots, counts, weights)
        counts_S = [0] * (stop - first)
        for slot, count in zip(slots, counts, strict=True):
            counts_S[slot - first] = count
        ends_S = torch.tensor(list(accumulate(counts_S)), dtype=torch.int32)
        gate_up_SMD, down_SDM = weights.gate_up_SMD[first:stop], weights.down_SDM[first:stop]
        h_PM = self._gated(self._grouped_mm(x_PD, gate_up_SMD.transpose(1, 2), offs=ends_S))
        return self._grouped_mm(h_PM, down_SDM.transpose(1, 2), offs=ends_S)

    def _in_slot_order(self, x_PD: torch.Tensor, slots: list[int], counts: list[int], weights: Any) -> torch.Tensor:
        """Sort rows by slot, as `grouped_mm` walks the stack, and put the answers back."""
        by_slot = sorted(range(len(slots)), key=slots.__getitem__)
        pieces = x_PD.split(counts)
        sorted_counts = [counts[n] for n in by_slot]
        y_PD = self._run(torch.cat([pieces[n] for n in by_slot]), [slots[n] for n in by_slot], sorted_counts, weights)
        found = dict(zip(by_slot, y_PD.split(sorted_counts), strict=True))
        return torch.cat([found[n] for n in range(len(slots))])


def grouped_mm() -> GroupedMM:
    """Return torch's grouped matrix product, under whichever name this torch has it; AttributeError if neither."""
    public = getattr(torch.nn.functional, "grouped_mm", None)
    return public if public is not None else torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]


def has_avx512() -> bool:
    """True where torch runs its AVX-512 code."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def fault_of(what: str, probe: Callable[[], torch.Tensor]) -> str:
    """Run `probe`, whose answer must be all 8s; return what is wrong with it."""
    try:
        answer = probe()
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"torch {torch.__version__} has no {what} on a CPU ({str(error).splitlines()[0]})"
    return "" if (answer == 8).all() else f"torch {torch.__version__}: {what} gives wrong answers"


def why_not_dtype(dtype: torch.dtype) -> str:
    """Return why this CPU should not compute in `dtype`; empty if it may.

    Without native instructions half precision runs several times slower than fp32 (measured: 7 times at 256 rows).
    """
    if dtype == torch.float32:
        return ""
    if dtype == torch.bfloat16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return ""
    return f"this CPU has no native {dtype_name(dtype)}"
