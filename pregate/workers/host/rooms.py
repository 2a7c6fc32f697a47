"""`Rooms`: how many slots a host has for units of each width, and whose they are.

Shape letters: L layers, R routed experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pregate.kernels.weights import Layout
from pregate.model.checkpoint import CheckpointReader
from pregate.workers.host.next_use import Unit
from pregate.workers.host.slots import SlotMap, SlotPool


@dataclass(frozen=True, eq=False)
class Room:
    """A pool, the units [L, R] whose width it is of, and how many of them it may hold: shared units have slots too."""

    pool: SlotPool
    mask_LR: np.ndarray
    num_slots: int


@dataclass(frozen=True)
class Load:
    """A unit on its way into a slot of a pool."""

    unit: Unit
    pool: SlotPool
    slot: int
    ahead: bool


class Rooms:
    """One room per width of expert. `homes`: how many units of each layer are at home here, of which a `share` below 1
    has slots; else all have, and others of this host's units room for `spare_slots` of each width, and always for those
    of one layer at once. `reserve_shared` leaves slots for every layer's shared units besides."""

    def __init__(
        self,
        reader: CheckpointReader,
        layout: Layout,
        homes: Mapping[int, int],
        *,
        share: float = 1.0,
        spare_slots: int = 0,
        reserve_shared: bool = False,
    ) -> None:
        cuts = reader.config.cuts
        self.first_L = np.array([cut.num_shared for cut in cuts])  # of the routed units, in the map
        self.routed_L = np.array([cut.num_routed for cut in cuts])
        self.shape = (len(cuts), int(self.routed_L.max(initial=0)))
        self.map = SlotMap.empty(len(cuts), max(self.first_L + self.routed_L, default=0))
        self._widths = [cut.expert_width for cut in cuts]
        self._spare_slots, self._rooms = spare_slots, dict[int, Room]()
        for width in dict.fromkeys(cut.expert_width for cut in cuts if cut.num_routed):
            layers = [n for n, cut in enumerate(cuts) if cut.num_routed and cut.expert_width == width]
            mask_LR = np.zeros(self.shape, dtype=bool)
            for layer in layers:
                mask_LR[layer, : self.routed_L[layer]] = True
            most = max(2, int(share * sum(homes[n] for n in layers) + 1e-6))
            num_slots = most if share < 1 else self._num_slots(layers, homes)
            num_shared = int(self.first_L[layers].sum()) * reserve_shared
            pool = SlotPool(layout, width, reader.hidden_size, num_slots + num_shared, self.map)
            self._rooms[width] = Room(pool, mask_LR, num_slots)

    def __iter__(self) -> Iterator[Room]:
        return iter(tuple(self._rooms.values()))

    @property
    def most_units(self) -> int:
        """Of how many units of one layer there is room for twice."""
        return min((room.num_slots // 2 for room in self), default=0)

    def of(self, layer: int) -> Room:
        return self._rooms[self._widths[layer]]

    def place(self, unit: Unit) -> Unit:
        """Where the map has a routed unit: its layer, and its number there."""
        layer, expert = unit
        return layer, int(self.first_L[layer]) + expert

    def enlarge(self, homes: Mapping[int, int]) -> None:
        """Add slots for these homes where there are too few."""
        for width, room in self._rooms.items():
            more = self._num_slots(np.flatnonzero(room.mask_LR.any(axis=1)).tolist(), homes) - room.num_slots
            if more > 0:
                room.pool.grow(more)
                self._rooms[width] = replace(room, num_slots=room.num_slots + more)

    def _num_slots(self, layers: Iterable[int], homes: Mapping[int, int]) -> int:
        """How many slots layers of one width want that have so many units at home here: those, and guests."""
        layers = list(layers)
        foreign = [int(self.routed_L[n]) - homes[n] for n in layers]
        return sum(homes[n] for n in layers) + min(max(self._spare_slots, *foreign, 0), sum(foreign))
