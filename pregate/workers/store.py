"""The units a host holds: in slots per layer, read from the checkpoint one by one, nothing else read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pregate.base.log import get_logger
from pregate.kernels.expert_ffn import Layout
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

    def __init__(self, reader: CheckpointReader, units: Iterable[tuple[int, int]], layout: Layout) -> None:
        self._reader = reader
        self._layout = layout
        self._experts: dict[int, np.ndarray] = {}
        self._weights: dict[int, Any] = {}
        self.stats = StoreStats()
        by_layer: dict[int, list[int]] = {}
        for layer, expert in sorted(set(units)):
            by_layer.setdefault(layer, []).append(expert)
        for layer, experts in by_layer.items():
            self._load(layer, experts)

    def lookup(self, layer: int, expert_ids: np.ndarray) -> tuple[np.ndarray, Any]:
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
        first = self._read(layer, experts[0])
        hidden, width = first[1].shape
        new = self._layout.allocate(len(both), width, hidden)
        for slot, expert in enumerate(both):
            if expert in held:
                self._layout.move(old, held.index(expert), new, slot)
            else:
                self._layout.put(new, slot, *(first if expert == experts[0] else self._read(layer, expert)))
        self._experts[layer] = np.array(both, dtype=np.int32)
        self._weights[layer] = new
        self.stats.num_units += len(experts)
        self.stats.held_bytes += len(experts) * new.slot_bytes

    def _read(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        unit = self._reader.read_unit(layer, expert)
        self.stats.units_read += 1
        self.stats.read_bytes += unit[0].nbytes + unit[1].nbytes
        return unit
