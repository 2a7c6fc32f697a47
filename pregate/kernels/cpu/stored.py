"""The expert FFN on a CPU with weights in the 16 bits that the checkpoint has them in: nothing is packed or converted,
a unit is read from the file into its slot. For experts that come and go.

Few rows meet weights as they lie (`sixteen_bits.py`); for many a matrix is made float32 first, which costs little
beside its product (docs/measurements.md).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from pregate.kernels.cpu.ffn import CPU, LoopFFN
from pregate.kernels.weights import LayerWeights, PlainLayout

#: Up to so many rows of an expert weights are read as they lie.
MOST_ROWS = 48
#: The longest vector of a CPU, in floats: shorter rows would be read beyond their end.
LEAST_WIDTH = 16
ACTIVATIONS = ("silu", "swish")
DTYPES = (torch.bfloat16, torch.float16)


class StoredFFN(LoopFFN):
    """Rows and sums in float32, weights in `stored`, one of `DTYPES`: their values are the checkpoint's."""

    name = "stored"

    def __init__(self, act: str, stored: torch.dtype) -> None:
        from pregate.kernels.cpu.sixteen_bits import run_experts  # compiled when it is first imported

        super().__init__(act)
        self._run_experts = run_experts
        self.layout = PlainLayout(stored, CPU)
        self._wide = threading.local()  # a matrix of each shape: fresh memory would cost as much as filling it

    @classmethod
    def why_not(cls, dtype: torch.dtype, widths: Iterable[int]) -> str:
        return "what the checkpoint holds was not said: ask `why_not_stored`"

    @classmethod
    def why_not_stored(cls, dtype: torch.dtype, act: str, widths: Iterable[int], stored: torch.dtype | None) -> str:
        """Return why it cannot serve experts that the checkpoint has in `stored`, None for several dtypes; else ''."""
        if stored not in DTYPES:
            return "it takes experts that a checkpoint has in bfloat16 or float16, all in one of them"
        if dtype != torch.float32:
            return f"it computes in float32, not in {dtype}"
        if act not in ACTIVATIONS:
            return f"it has no {act}; it has {', '.join(ACTIVATIONS)}"
        return f"widths below {LEAST_WIDTH}" if min(widths) < LEAST_WIDTH else ""

    def _add_all(
        self, out_TD: torch.Tensor, x_TD: torch.Tensor, slots: list[int], weights: LayerWeights
    ) -> torch.Tensor:
        """In one call, for few rows."""
        num_rows = len(x_TD)
        if num_rows > MOST_ROWS:
            return super()._add_all(out_TD, x_TD, slots, weights)
        y_PD = self._run(x_TD.repeat(len(slots), 1), slots, [num_rows] * len(slots), weights)
        for y_TD in y_PD.split(num_rows):
            out_TD += y_TD
        return out_TD

    def _run(self, x_PD: torch.Tensor, slots: list[int], counts: list[int], weights: LayerWeights) -> torch.Tensor:
        if max(counts) > MOST_ROWS:
            return super()._run(x_PD, slots, counts, weights)
        return self._run_experts(x_PD, slots, counts, weights.gate_up_SMD, weights.down_SDM)

    def _expert(self, x_ND: torch.Tensor, weights: LayerWeights, slot: int) -> torch.Tensor:
        if len(x_ND) <= MOST_ROWS:
            return self._run(x_ND, [slot], [len(x_ND)], weights)
        h_NM = self._gated(torch.mm(x_ND, self._widened(weights.gate_up_SMD[slot]).t()))
        return torch.mm(h_NM, self._widened(weights.down_SDM[slot]).t())

    def _widened(self, weight_NK: torch.Tensor) -> torch.Tensor:
        """The matrix in float32, until this thread asks for the next of its shape."""
        held, name = vars(self._wide), str(weight_NK.shape)
        if name not in held:
            held[name] = torch.empty(weight_NK.shape)
        return held[name].copy_(weight_NK)
