"""The units a host holds: in slots per layer, read from the checkpoint one by one, nothing else read.

Shape letters: L layers, R routed experts, U units asked for, E units of a layer, shared ones first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pregate.base.log import get_logger
from pregate.kernels.weights import Layout
from pregate.model.checkpoint import CheckpointReader

_log = get_logger(__name__)
Unit = tuple[torch.Tensor, torch.Tensor]


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

    A unit that is asked for and not held is read then and there (a miss) and kept. `versions` int64 [L] count how often
    a layer's slots changed: what was looked up under another version is no longer true.
    """

    def __init__(self, reader: CheckpointReader, units: Iterable[tuple[int, int]], layout: Layout) -> None:
        self._reader = reader
        self._layout = layout
        # Ids in slot order; shared units of a layer, where held, are -S .. -1.
        self._ids: dict[int, list[int]] = {}
        self._weights: dict[int, Any] = {}
        num_routed = [cut.num_routed for cut in reader.config.cuts]
        self._slot_LR = np.full((len(num_routed), max(num_routed, default=0)), -1, dtype=np.int32)
        self.versions = np.zeros(len(num_routed), dtype=np.int64)
        self.stats = StoreStats()
        by_layer: dict[int, list[int]] = {}
        for layer, expert in sorted(set(units)):
            by_layer.setdefault(layer, []).append(expert)
        for layer, experts in by_layer.items():
            self._load(layer, experts)

    @property
    def complete(self) -> bool:
        """True while every routed unit of the checkpoint is held."""
        return self.stats.num_units == sum(cut.num_routed for cut in self._reader.config.cuts)

    def slots(self, layers: np.ndarray | int, expert_ids: np.ndarray) -> np.ndarray:
        """Return int32 [U]: the slot of each unit, -1 for one that is not held or does not exist. Reads nothing."""
        layers = np.asarray(layers)
        num_layers, num_routed = self._slot_LR.shape
        exists = (layers >= 0) & (layers < num_layers) & (expert_ids >= 0) & (expert_ids < num_routed)
        if exists.all():
            return self._slot_LR[layers, expert_ids]
        found = self._slot_LR[np.where(exists, layers, 0), np.where(exists, expert_ids, 0)]
        return np.where(exists, found, -1).astype(np.int32)

    def lookup(self, layer: int, expert_ids: np.ndarray) -> tuple[np.ndarray, Any]:
        """Return the slots of these experts (ascending ids) and the layer's weights; reads what is missing.

        Raises the checkpoint's UserError for a unit that does not exist.
        """
        slots = self.slots(layer, expert_ids)
        if (slots < 0).any():
            missing = expert_ids[slots < 0].tolist()
            _log.info("layer %d: experts %s are not held here; reading them", layer, missing)
            self._load(layer, missing)
            self.stats.misses += len(missing)
            slots = self.slots(layer, expert_ids)
        return slots, self._weights[layer]

    def weights(self, layer: int) -> Any:
        """Return the weights of a layer of which something is held; replaced when the layer's version changes."""
        return self._weights[layer]

    def unit_slots(self, layer: int) -> np.ndarray:
        """Return int32 [E]: slots of the shared units held here, in order, then of all routed ones, -1 for absent."""
        num_shared = sum(unit < 0 for unit in self._ids.get(layer, []))
        routed = self._slot_LR[layer, : self._reader.config.cuts[layer].num_routed]
        return np.concatenate([np.arange(num_shared, dtype=np.int32), routed])

    def units(self) -> list[tuple[int, int]]:
        """Return the routed units held, in order."""
        return [(layer, unit) for layer in sorted(self._ids) for unit in self._ids[layer] if unit >= 0]

    def hold_shared(self, layer: int, shared: Sequence[Unit]) -> None:
        """Put a layer's shared units before its routed ones, once. They do not count as units of this host."""
        if any(unit < 0 for unit in self._ids.get(layer, [])):
            return  # another engine of this process gave them: the same checkpoint, the same units
        self._insert(layer, range(-len(shared), 0), lambda unit: shared[unit])

    def _load(self, layer: int, experts: list[int]) -> None:
        """Read `experts` (ascending, not yet held) of `layer` and put them in order among those already held."""
        self._insert(layer, experts, lambda expert: self._read(layer, expert))
        self.stats.num_units += len(experts)

    def _insert(self, layer: int, units: Sequence[int], get: Callable[[int], Unit]) -> None:
        """Put `units` among those already held. The layer's stacks are made anew, so a miss copies the layer once."""
        held = self._ids.get(layer, [])
        ids = sorted([*held, *units])
        old = self._weights.get(layer)
        first = get(units[0])
        hidden, width = first[1].shape
        new = self._layout.allocate(len(ids), width, hidden)
        for slot, unit in enumerate(ids):
            if unit in held:
                self._layout.move(old, held.index(unit), new, slot)
            else:
                self._layout.put(new, slot, *(first if unit == units[0] else get(unit)))
        self._ids[layer], self._weights[layer] = ids, new
        routed = [(unit, slot) for slot, unit in enumerate(ids) if unit >= 0]
        for unit, slot in routed:
            self._slot_LR[layer, unit] = slot
        self.versions[layer] += 1
        self.stats.held_bytes += len(units) * new.slot_bytes

    def _read(self, layer: int, expert: int) -> Unit:
        unit = self._reader.read_unit(layer, expert)
        self.stats.units_read += 1
        self.stats.read_bytes += unit[0].nbytes + unit[1].nbytes
        return unit
