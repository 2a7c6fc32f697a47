"""How experts are held in memory: stacks of slots, padded to what a kernel reads without masks, perhaps quantised.

Shape letters: S slots, M expert width, D hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

#: Triton's blocks divide expert widths padded to this.
WIDTH_MULTIPLE = 64
#: Largest value of each quantised type.
QUANT_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """Stacked experts of one layer: `gate_up_SMD` [S, 2M, D] (gate rows first), `down_SDM` [S, D, M].

    Quantised stacks have one fp32 scale per row: `gate_up_scale` [S, 2M], `down_scale` [S, D].
    """

    gate_up_SMD: torch.Tensor
    down_SDM: torch.Tensor
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None

    @property
    def num_slots(self) -> int:
        return self.down_SDM.shape[0]

    @property
    def slot_bytes(self) -> int:
        """Bytes that one slot takes."""
        parts = (self.gate_up_SMD, self.down_SDM, self.gate_up_scale, self.down_scale)
        return sum(part[0].nbytes for part in parts if part is not None)


class Layout(ABC):
    """How an implementation holds experts in slots. Weights are opaque to everyone else."""

    @abstractmethod
    def allocate(self, num_slots: int, width: int, hidden: int) -> Any:
        """Return uninitialised slots for experts `width` wide; they have `num_slots` and `slot_bytes`."""

    @abstractmethod
    def put(self, weights: Any, slot: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Write one expert, `gate_up` [2M, D] and `down` [D, M] in any dtype, into `slot`."""

    def memory_of(self, weights: Any, slot: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where `put` would copy an expert as it is, `gate_up` [2M, D] and `down` [D, M], contiguous and in the host's
        memory; None where it is held in another way."""
        return None

    @abstractmethod
    def move(self, old: Any, old_slot: int, new: Any, new_slot: int) -> None:
        """Take over a slot of other weights of the same widths as it is held."""

    def stack(self, gate_up_SMD: torch.Tensor, down_SDM: torch.Tensor) -> Any:
        """Return a whole stack put slot by slot into fresh weights; no part of a gradient's graph."""
        num_slots, hidden, width = down_SDM.shape
        weights = self.allocate(num_slots, width, hidden)
        # The copies would keep the weights they were made from, were these parameters with a gradient.
        for slot, (gate_up, down) in enumerate(zip(gate_up_SMD.detach(), down_SDM.detach(), strict=True)):
            self.put(weights, slot, gate_up, down)
        return weights


class _TensorLayout(Layout):
    """Experts in stacked tensors of one dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    def allocate(self, num_slots: int, width: int, hidden: int) -> LayerWeights:
        return LayerWeights(self._empty(num_slots, 2 * width, hidden), self._empty(num_slots, hidden, width))

    def put(self, weights: LayerWeights, slot: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        for part, stack in ((gate_up, weights.gate_up_SMD), (down, weights.down_SDM)):
            stack[slot].copy_(self._on_its_way(part), non_blocking=True)

    def _on_its_way(self, part: torch.Tensor) -> torch.Tensor:
        """What to copy: from pinned memory to a GPU nobody waits, the stream that is current has it done in turn."""
        if self.device.type != "cuda" or part.is_cuda:
            return part
        part = part.to(self.dtype)
        return part if part.is_pinned() else part.pin_memory()

    def move(self, old: LayerWeights, old_slot: int, new: LayerWeights, new_slot: int) -> None:
        for name in ("gate_up_SMD", "down_SDM", "gate_up_scale", "down_scale"):
            source = getattr(old, name)
            if source is not None:
                getattr(new, name)[new_slot].copy_(source[old_slot])

    def _empty(self, num_slots: int, num_rows: int, num_columns: int) -> torch.Tensor:
        return torch.empty(num_slots, num_rows, num_columns, dtype=self.dtype, device=self.device)


class PlainLayout(_TensorLayout):
    """Experts as the checkpoint has them."""

    def memory_of(self, weights: LayerWeights, slot: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (weights.gate_up_SMD[slot], weights.down_SDM[slot]) if self.device.type == "cpu" else None

    def stack(self, gate_up_SMD: torch.Tensor, down_SDM: torch.Tensor) -> LayerWeights:
        """Return a whole stack in this layout; without a copy where it is in it already."""
        return LayerWeights(*(part.detach().to(self.device, self.dtype) for part in (gate_up_SMD, down_SDM)))


class TransposedLayout(_TensorLayout):
    """The shapes of `PlainLayout` as views of memory that holds each matrix transposed.

    A product x W' then reads its second factor in order, which MKL does faster at few rows (docs/measurements.md).
    """

    def put(self, weights: LayerWeights, slot: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        # Written from this side, and in one dtype, torch copies in blocks: 5 times faster.
        weights.gate_up_SMD[slot].t().copy_(gate_up.to(self.dtype).t())
        weights.down_SDM[slot].t().copy_(down.to(self.dtype).t())

    def _empty(self, num_slots: int, num_rows: int, num_columns: int) -> torch.Tensor:
        return super()._empty(num_slots, num_columns, num_rows).transpose(1, 2)


class PaddedLayout(_TensorLayout):
    """Expert width padded with zeros to a multiple of 64: act(0) * 0 = 0 for every padded neuron, so it is exact."""

    def allocate(self, num_slots: int, width: int, hidden: int) -> LayerWeights:
        return super().allocate(num_slots, padded_width(width), hidden)

    def put(self, weights: LayerWeights, slot: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().put(weights, slot, *pad(gate_up, down, weights.down_SDM.shape[2]))


class QuantisedLayout(PaddedLayout):
    """8-bit weights with one scale per row (W8A16): half the bytes of bf16 (benchmarks/results/quantised.json)."""

    def allocate(self, num_slots: int, width: int, hidden: int) -> LayerWeights:
        plain = super().allocate(num_slots, width, hidden)
        scales = (torch.empty(part.shape[:2], device=self.device) for part in (plain.gate_up_SMD, plain.down_SDM))
        return LayerWeights(plain.gate_up_SMD, plain.down_SDM, *scales)

    def put(self, weights: LayerWeights, slot: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        assert weights.gate_up_scale is not None and weights.down_scale is not None
        padded = pad(gate_up, down, weights.down_SDM.shape[2])
        for part, stack, scales in zip(
            padded, (weights.gate_up_SMD, weights.down_SDM), (weights.gate_up_scale, weights.down_scale), strict=True
        ):
            values, row_scale = quantise_rows(part, self.dtype)
            stack[slot].copy_(values)
            scales[slot].copy_(row_scale)


def padded_width(width: int) -> int:
    """Expert width as Triton's kernels read it. Example: 688 gives 704."""
    return -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def pad(gate_up: torch.Tensor, down: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one expert with zero neurons added up to `width`: `gate_up` [2 width, D], `down` [D, width]."""
    extra = width - down.shape[1]
    if not extra:
        return gate_up, down
    halves = [F.pad(half, (0, 0, 0, extra)) for half in gate_up.chunk(2)]
    return torch.cat(halves), F.pad(down, (0, extra))


def quantise_rows(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `weight` [N, K] in int8 or float8_e4m3fn and the fp32 scale [N] that undoes it, row by row.

    Example: the row [1, -2, 0.5] in int8 has scale 2 / 127 and values [64, -127, 32] (63.5 rounds to even).
    """
    weight = weight.to(torch.float32)
    scale_N = weight.abs().amax(dim=1).clamp_min(1e-30) / QUANT_MAX[dtype]
    values = weight / scale_N[:, None]
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale_N


def split_shared(gate_up: torch.Tensor, down: torch.Tensor, num_shared: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a shared expert stored as one FFN into `num_shared` experts whose outputs sum to its own."""
    gates, ups = (half.chunk(num_shared) for half in gate_up.chunk(2))
    downs = down.chunk(num_shared, dim=1)
    return [(torch.cat([gate, up]), part) for gate, up, part in zip(gates, ups, downs, strict=True)]
