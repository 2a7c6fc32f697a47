"""The units a host holds: in pools of slots, one per expert width, read from the checkpoint one by one.

Shape letters: L layers, R routed experts, U units asked for, E units of a layer, shared ones first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pregate.base.log import get_logger
from pregate.kernels.weights import Layout
from pregate.model.checkpoint import CheckpointReader
from pregate.workers.host.slots import SlotMap, SlotPool, Unit

_log = get_logger(__name__)


@dataclass
class StoreStats:
    """Counters since the start. `read_bytes` is in the checkpoint's dtype, `held_bytes` as held in memory."""

    num_units: int = 0
    units_read: int = 0
    read_bytes: int = 0
    held_bytes: int = 0
    misses: int = 0
    evictions: int = 0


class UnitStore:
    """The units this host is home to, in order and for good, and those it was asked for besides.

    A unit that is asked for and not held is read then and there (a miss) and kept as a guest. There is room for
    `spare_slots` guests of each width, and always for those of one layer at once; then the one that was not asked for
    longest goes. `reserve_shared` leaves room for every layer's shared units. `versions` int64 [L] count how often a
    layer's slots changed.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        units: Iterable[tuple[int, int]],
        layout: Layout,
        *,
        spare_slots: int = 0,
        reserve_shared: bool = False,
    ) -> None:
        self._reader, self._cuts = reader, reader.config.cuts
        units = sorted(set(units))
        self._first_L = np.array([cut.num_shared for cut in self._cuts])  # of the routed units, in the map
        self._routed_L = np.array([cut.num_routed for cut in self._cuts])
        self._map = SlotMap.empty(len(self._cuts), max(self._first_L + self._routed_L, default=0))
        self.versions, self.stats = self._map.versions, StoreStats()
        self._guests: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._pools: dict[int, SlotPool] = {}
        homes = Counter(layer for layer, _ in units)
        for width in dict.fromkeys(cut.expert_width for cut in self._cuts if cut.num_routed):
            layers = [n for n, cut in enumerate(self._cuts) if cut.num_routed and cut.expert_width == width]
            foreign = [self._cuts[n].num_routed - homes[n] for n in layers]
            num_slots = sum(homes[n] for n in layers) + min(max(spare_slots, *foreign, 0), sum(foreign))
            num_slots += sum(self._cuts[n].num_shared for n in layers) * reserve_shared
            self._pools[width] = SlotPool(layout, width, reader.hidden_size, num_slots, self._map)
        for layer, expert in units:
            self._put(layer, expert, reader.read_unit(layer, expert))

    @property
    def complete(self) -> bool:
        """True while every routed unit of the checkpoint is held."""
        return self.stats.num_units == int(self._routed_L.sum())

    def slots(self, layers: np.ndarray | int, expert_ids: np.ndarray) -> np.ndarray:
        """Return int32 [U]: the slot of each unit, -1 for one that is not held or does not exist. Reads nothing."""
        layers = np.asarray(layers)
        here = np.where((layers >= 0) & (layers < len(self._cuts)), layers, 0)
        exists = (here == layers) & (expert_ids >= 0) & (expert_ids < self._routed_L[here])
        found = self._map.slots[here, np.where(exists, self._first_L[here] + expert_ids, 0)]
        if self._guests:
            asked = np.stack(np.broadcast_arrays(layers, expert_ids), axis=-1).tolist()
            for unit in filter(self._guests.__contains__, map(tuple, asked)):
                self._guests.move_to_end(unit)
        return found if exists.all() else np.where(exists, found, -1).astype(np.int32)

    def lookup(self, layer: int, expert_ids: np.ndarray) -> tuple[np.ndarray, Any]:
        """Return the slots of these experts (ascending ids) and the weights they lie in; reads what is missing.

        Raises the checkpoint's UserError for a unit that does not exist.
        """
        slots = self.slots(layer, expert_ids)
        if (slots < 0).any():
            missing = expert_ids[slots < 0].tolist()
            _log.info("layer %d: experts %s are not held here; reading them", layer, missing)
            wanted = {(layer, expert) for expert in expert_ids.tolist()}
            for expert in missing:
                self._admit(layer, expert, wanted)
            slots = self.slots(layer, expert_ids)
        return slots, self.weights(layer)

    def stored(self, layer: int, expert: int) -> Unit:
        """Return a unit as the checkpoint has it; reads it, and does not keep it."""
        return self._reader.read_unit(layer, expert)

    def weights(self, layer: int) -> Any:
        """Return the stack that a layer's slots are in."""
        return self._pool(layer).weights

    def unit_slots(self, layer: int) -> np.ndarray:
        """Return int32 [E]: slots of the shared units, where they are held here, then of all routed ones, -1 for
        absent."""
        first = int(self._first_L[layer])
        row = self._map.slots[layer, : first + self._routed_L[layer]]
        return row[0 if first and row[0] >= 0 else first :].copy()

    def units(self) -> list[tuple[int, int]]:
        """Return the routed units held, in order."""
        layers, units = np.nonzero(self._map.slots >= 0)
        experts = units - self._first_L[layers]
        return [(int(n), int(expert)) for n, expert in zip(layers, experts, strict=True) if expert >= 0]

    def hold_shared(self, layer: int, shared: Sequence[Unit]) -> None:
        """Put a layer's shared units beside its routed ones, once. They do not count as units of this host."""
        if self._map.slots[layer, 0] >= 0:
            return  # another engine of this process gave them: the same checkpoint, the same units
        pool = self._pool(layer)
        for unit, weights in enumerate(shared):
            if not pool.num_free:
                pool.grow(len(shared) - unit)
            pool.put(layer, unit, weights)
        self.stats.held_bytes += len(shared) * pool.slot_bytes

    def _admit(self, layer: int, expert: int, wanted: set[tuple[int, int]]) -> None:
        """Read a guest; where there is no room, in the place of the one not asked for longest that is not `wanted`."""
        weights = self._reader.read_unit(layer, expert)
        pool = self._pool(layer)
        if not pool.num_free:
            ours = (unit for unit in self._guests if self._pool(unit[0]) is pool and unit not in wanted)
            leaving = next(ours)  # there is one: the pool has room for all guests of one layer
            del self._guests[leaving]
            pool.evict(leaving[0], int(self._first_L[leaving[0]]) + leaving[1])
            self.stats.num_units -= 1
            self.stats.evictions += 1
            self.stats.held_bytes -= pool.slot_bytes
        self._put(layer, expert, weights)
        self._guests[layer, expert] = None
        self.stats.misses += 1

    def _put(self, layer: int, expert: int, weights: Unit) -> None:
        pool = self._pool(layer)
        pool.put(layer, int(self._first_L[layer]) + expert, weights)
        self.stats.num_units += 1
        self.stats.units_read += 1
        self.stats.read_bytes += weights[0].nbytes + weights[1].nbytes
        self.stats.held_bytes += pool.slot_bytes

    def _pool(self, layer: int) -> SlotPool:
        return self._pools[self._cuts[layer].expert_width]
