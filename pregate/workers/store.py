"""The units a host holds: stacked per layer, read from the checkpoint one by one, nothing else read.

Shape letters: S slots, M expert width, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from pregate.base.log import get_logger
from pregate.kernels.expert_ffn import LayerWeights
from pregate.model.checkpoint import CheckpointReader

_log = get_logger(__name__)


@dataclass
class StoreStats:
    """Counters since the start. `read_bytes` is in the checkpoint's dtype, `held_bytes` as held in memory."""

    num_units: int = 0
    units_read: int = 0
    read_bytes: int = 0
    held_bytes: int = 0
    misses: int = 0


class UnitStore:
    """Slots of each layer in ascending expert id, so that slot order is expert order.

    A unit that is asked for and not held is read then and there (a miss) and kept.
    """

    def __init__(self, reader: CheckpointReader, units: Iterable[tuple[int, int]], dtype: torch.dtype) -> None:
        self._reader = reader
        self._dtype = dtype
        self._experts: dict[int, np.ndarray] = {}
        self._weights: dict[int, LayerWeights] = {}
        self.stats = StoreStats()
        by_layer: dict[int, list[int]] = {}
        for layer, expert in sorted(set(units)):
            by_layer.setdefault(layer, []).append(expert)
        for layer, experts in by_layer.items():
            self._load(layer, experts)

    def lookup(self, layer: int, expert_ids: np.ndarray) -> tuple[np.ndarray, LayerWeights]:
        """Return the slots of these experts (ascending ids) and the layer's weights; reads what is missing.

        Raises the checkpoint's UserError for a unit that does not exist.
        """
        missing = np.setdiff1d(expert_ids, self._experts[layer]) if layer in self._experts else expert_ids
        if missing.size:
            _log.info("layer %d: experts %s are not held here; reading them", layer, missing.tolist())
            self._load(layer, missing.tolist())
            self.stats.misses += missing.size
        return np.searchsorted(self._experts[layer], expert_ids), self._weights[layer]

    def units(self) -> list[tuple[int, int]]:
        """Return the units held, in order."""
        return [(layer, expert) for layer in sorted(self._experts) for expert in self._experts[layer].tolist()]

    def _load(self, layer: int, experts: list[int]) -> None:
        """Read `experts` (not yet held) of `layer` and put them, in order, among those already held.

        The layer's stacks are made anew, so a miss copies the layer once.
        """
        held = self._experts[layer].tolist() if layer in self._experts else []
        both = sorted(held + experts)
        old = self._weights.get(layer)
        stacks: LayerWeights | None = None
        for slot, expert in enumerate(both):
            if old is not None and expert in held:
                index = held.index(expert)
                gate_up, down = old.gate_up_SMD[index], old.down_SDM[index]
            else:
                gate_up, down = self._read(layer, expert)
            stacks = stacks or self._allocate(len(both), gate_up, down)
            stacks.gate_up_SMD[slot], stacks.down_SDM[slot] = gate_up, down
        assert stacks is not None
        self._experts[layer] = np.array(both, dtype=np.int32)
        self._weights[layer] = stacks
        self.stats.num_units += len(experts)
        self.stats.held_bytes += len(experts) * (stacks.gate_up_SMD[0].nbytes + stacks.down_SDM[0].nbytes)

    def _allocate(self, num_slots: int, gate_up: torch.Tensor, down: torch.Tensor) -> LayerWeights:
        return LayerWeights(
            torch.empty(num_slots, *gate_up.shape, dtype=self._dtype),
            torch.empty(num_slots, *down.shape, dtype=self._dtype),
        )

    def _read(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        unit = self._reader.read_unit(layer, expert)
        self.stats.units_read += 1
        self.stats.read_bytes += unit[0].nbytes + unit[1].nbytes
        return unit
