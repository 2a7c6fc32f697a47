"""The expert FFN on a CPU: a loop over experts, and `grouped_mm` over expert-sorted rows.

Both compute exactly what `reference.expert_ffn` computes for each expert's rows, with the same operations, so they
agree with each other bit for bit. Shape letters: P pairs, D hidden width, M expert width, S slots, U experts used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from pregate.kernels.reference import Activation, activation

GroupedMM = Callable[..., torch.Tensor]
#: `grouped_mm` wants every row to start on a 16-byte boundary.
ROW_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """Stacked experts of one layer: `gate_up_SMD` [S, 2M, D] (gate rows first), `down_SDM` [S, D, M]."""

    gate_up_SMD: torch.Tensor
    down_SDM: torch.Tensor


class LoopFFN:
    """One matrix product per expert and half. Best for one row per expert, where each product is a vector times a
    matrix and there is nothing to group."""

    name = "loop"

    def __init__(self, act: str) -> None:
        self._act: Activation = activation(act)

    def __call__(
        self, x_PD: torch.Tensor, slots: np.ndarray, counts: np.ndarray, weights: LayerWeights
    ) -> torch.Tensor:
        y_PD = torch.empty_like(x_PD)
        start = 0
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            rows = slice(start, start + count)
            gate_PM, up_PM = torch.mm(x_PD[rows], weights.gate_up_SMD[slot].t()).chunk(2, dim=-1)
            torch.mm(self._act(gate_PM) * up_PM, weights.down_SDM[slot].t(), out=y_PD[rows])
            start += count
        return y_PD


class GroupedFFN:
    """`grouped_mm` over all experts at once; the loop where every expert has a single row."""

    name = "grouped"

    def __init__(self, act: str) -> None:
        self._act: Activation = activation(act)
        self._grouped_mm = grouped_mm()
        self._loop = LoopFFN(act)

    def __call__(
        self, x_PD: torch.Tensor, slots: np.ndarray, counts: np.ndarray, weights: LayerWeights
    ) -> torch.Tensor:
        if len(counts) == x_PD.shape[0]:
            return self._loop(x_PD, slots, counts, weights)
        ends_S = group_ends(slots, counts, weights.down_SDM.shape[0])
        h_PM = self._grouped_mm(x_PD, weights.gate_up_SMD.transpose(1, 2), offs=ends_S)
        gate_PM, up_PM = h_PM.chunk(2, dim=-1)
        return self._grouped_mm(self._act(gate_PM) * up_PM, weights.down_SDM.transpose(1, 2), offs=ends_S)


def group_ends(slots: np.ndarray, counts: np.ndarray, num_slots: int) -> torch.Tensor:
    """Return int32 [S]: where each slot's rows end, for ascending `slots`.

    Example: slots [0, 2], counts [3, 4] of 4 slots: [3, 3, 7, 7].
    """
    count_S = np.zeros(num_slots, dtype=np.int32)
    count_S[slots] = counts
    return torch.from_numpy(np.cumsum(count_S, dtype=np.int32))


def grouped_mm() -> GroupedMM:
    """Return torch's grouped matrix product, under whichever name this torch has it; AttributeError if neither."""
    public = getattr(torch.nn.functional, "grouped_mm", None)
    return public if public is not None else torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]


def why_not_grouped(widths: Iterable[int], dtype: torch.dtype) -> str:
    """Return why `grouped_mm` cannot serve matrices with these row lengths; empty if it can."""
    for width in widths:
        if width * dtype.itemsize % ROW_ALIGNMENT_BYTES:
            return f"rows of {width} {dtype} values do not start on {ROW_ALIGNMENT_BYTES}-byte boundaries"
    probe = torch.ones(2, 8, dtype=dtype)
    try:
        grouped_mm()(probe, torch.ones(1, 8, 8, dtype=dtype), offs=torch.tensor([2], dtype=torch.int32))
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"torch {torch.__version__} has no grouped_mm for {dtype} on a CPU ({error})"
    return ""


def why_not_dtype(dtype: torch.dtype) -> str:
    """Return why this CPU should not compute in `dtype`; empty if it may.

    Without native instructions half precision runs several times slower than fp32 (measured: 7 times at 256 rows).
    """
    if dtype == torch.float32:
        return ""
    if dtype == torch.bfloat16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return ""
    return f"this CPU has no native {str(dtype).removeprefix('torch.')}"
