"""`SlotPool`: every unit of one width, of all layers, in one stack of slots. A unit is put in, or out, alone.

Shape letters: L layers, U units of a layer, shared ones first, then the routed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pregate.kernels.weights import Layout

Unit = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class SlotMap:
    """The one way to weights: `slots` int32 [L, U], -1 for a unit that is not held. `versions` int64 [L] count how
    often a layer's slots changed: what was looked up under another version is no longer true."""

    slots: np.ndarray
    versions: np.ndarray

    @classmethod
    def empty(cls, num_layers: int, num_units: int) -> SlotMap:
        return cls(np.full((num_layers, num_units), -1, dtype=np.int32), np.zeros(num_layers, dtype=np.int64))


class SlotPool:
    """`num_slots` slots for experts `width` wide. `slot_map` is shared by the pools of a host: a layer's units are all
    of one width, so each row of it belongs to one pool. Free slots are given out from the lowest, so that units put
    one after another lie side by side."""

    def __init__(self, layout: Layout, width: int, hidden: int, num_slots: int, slot_map: SlotMap) -> None:
        self._layout, self._width, self._hidden, self._map = layout, width, hidden, slot_map
        self.weights = layout.allocate(num_slots, width, hidden)
        self.slot_bytes: int = self.weights.slot_bytes
        self._free = list(range(num_slots))[::-1]
        self._owner: dict[int, tuple[int, int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def put(self, layer: int, unit: int, weights: Unit) -> None:
        """Copy a unit that is not held into a free slot, which there must be."""
        slot = self.take(layer, unit)
        try:
            self.write(slot, weights)
        except BaseException:  # for lack of memory, say: then the slot stays free
            self.give_back(slot)
            raise
        self.publish(slot)

    def take(self, layer: int, unit: int) -> int:
        """Take a free slot for a unit that is not held: it is nobody else's, and not yet found by the map."""
        assert self._map.slots[layer, unit] < 0, f"unit {unit} of layer {layer} is held already"
        slot = self._free.pop()
        self._owner[slot] = layer, unit
        return slot

    def write(self, slot: int, weights: Unit) -> None:
        """Copy a unit into a slot that was taken for it. Other threads may use the pool meanwhile."""
        self._layout.put(self.weights, slot, *weights)

    def memory_of(self, slot: int) -> Unit | None:
        """Where a unit can be read into a slot that was taken for it, without a copy between; None where it cannot."""
        return self._layout.memory_of(self.weights, slot)

    def publish(self, slot: int) -> None:
        """Let the map find a slot that was written."""
        layer, unit = self._owner[slot]
        self._map.slots[layer, unit] = slot
        self._map.versions[layer] += 1

    def give_back(self, slot: int) -> None:
        """Free a slot that was taken and not published."""
        del self._owner[slot]
        self._free.append(slot)

    def evict(self, layer: int, unit: int) -> None:
        """Free the slot of a unit that is held."""
        slot = int(self._map.slots[layer, unit])
        assert self._owner.pop(slot) == (layer, unit)
        self._free.append(slot)
        self._map.slots[layer, unit] = -1
        self._map.versions[layer] += 1

    def grow(self, num_slots: int) -> None:
        """Add slots. A stack is one piece of memory, so all that is held is copied, slot by slot, and for a while held
        twice: for the start, where an engine brings its shared units, and for new homes, not for a miss."""
        held = self.weights.num_slots
        coming = [slot for slot, owner in self._owner.items() if self._map.slots[owner] != slot]
        assert not coming, "what is being written into a slot would be lost"
        grown = self._layout.allocate(held + num_slots, self._width, self._hidden)
        for slot in self._owner:
            self._layout.move(self.weights, slot, grown, slot)
        self.weights = grown
        for layer, _ in self._owner.values():
            self._map.versions[layer] += 1
        self._free = [*range(held, held + num_slots)[::-1], *self._free]

    def check(self) -> None:
        """AssertionError unless every slot is either free or owned by the one unit whose slot the map says it is."""
        slots = sorted([*self._free, *self._owner])
        assert slots == list(range(self.weights.num_slots)), "every slot is free or owned, and once"
        for slot, (layer, unit) in self._owner.items():
            assert self._map.slots[layer, unit] == slot, "the map names the owner's slot"
