"""`UnitStates`: how each unit of a host stands, and from that what is loaded ahead next, and what leaves for it.

NumPy, no thread: the store asks under its lock. Shape letters: L layers, R routed experts.
"""

from __future__ import annotations

import numpy as np

from pregate.workers.host.next_use import FAR, Outlook, Unit, Uses
from pregate.workers.host.rooms import Room, Rooms


class UnitStates:
    """Bool [L, R] each: `held_LR` in a slot, `coming_LR` on its way there, `fixed_LR` at home here and not to leave,
    `in_use_LR` looked up and not released, `fresh_LR` loaded ahead and not used yet, `failed_LR` could not be loaded
    ahead."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self.held_LR, self.coming_LR, self.fresh_LR, self.in_use_LR, self.fixed_LR, self.failed_LR = (
            np.zeros(rooms.shape, dtype=bool) for _ in range(6)
        )

    @property
    def there_LR(self) -> np.ndarray:  # noqa: N802
        """Held or on their way."""
        return self.held_LR | self.coming_LR

    def num_free(self, room: Room) -> int:
        return room.num_slots - int((self.there_LR & room.mask_LR).sum())

    def may_go(self, room: Room) -> np.ndarray:
        return self.held_LR & room.mask_LR & ~self.fixed_LR & ~self.in_use_LR

    def to_fetch(self) -> np.ndarray:
        """What could be loaded ahead."""
        return ~(self.there_LR | self.failed_LR)

    def next_fetch(self, outlook: Outlook, lead: int) -> tuple[Unit, Unit | None] | None:
        """Return what to load ahead where home units come and go, and what leaves for it (None: a slot is free)."""
        absent_LR, chosen = self.to_fetch(), list[tuple[int, Unit, Unit | None]]()
        for room in self._rooms:
            found = outlook.fetch(absent_LR & room.mask_LR, self.may_go(room), self.num_free(room), lead)
            if found is not None:
                chosen.append((int(outlook.distance_LR[found[0]]), *found))
        return min(chosen)[1:] if chosen else None

    def next_guest(self, outlook: Outlook, uses: Uses, stalled: bool) -> Unit | None:
        """Return what to load for another host, into a free slot alone: nothing is known of what the compute thread has
        in use. What is not certain to be asked for waits while that thread reads (`stalled`)."""
        wanted_LR = outlook.known_LR < FAR // 2 if stalled else uses.wanted()
        wanted_LR = wanted_LR & self.to_fetch()
        chosen = [outlook.nearest(wanted_LR & room.mask_LR) for room in self._rooms if self.num_free(room)]
        return min(
            (unit for unit in chosen if unit is not None), key=lambda u: (outlook.distance_LR[u], u), default=None
        )

    def guest_to_leave(self, uses: Uses) -> Unit | None:
        """Return a guest that nobody expects to ask for, where those who lack would find no free slot."""
        wanted_LR, outlook = uses.wanted(), uses.look()
        for room in self._rooms:
            if int((wanted_LR & ~self.there_LR & room.mask_LR).sum()) > self.num_free(room):
                leaving = outlook.farthest(self.may_go(room) & ~wanted_LR)
                if leaving is not None:
                    return leaving
        return None
