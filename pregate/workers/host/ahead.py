"""`Ahead`: what a host loads before it is asked for, and when that is worth a look. No thread: asked under the store's
lock. Shape letters: L layers, R routed experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from pregate.base.log import get_logger
from pregate.workers.host.next_use import FAR, Outlook, Unit, Uses
from pregate.workers.host.rooms import Load, Rooms
from pregate.workers.host.source import UnitSource
from pregate.workers.host.unit_states import UnitStates

#: Units that are begun to be loaded at once: to see what is next takes as long as to read a small one.
AT_ONCE, AT_ONCE_BYTES = 8, 16 << 20
#: Units that the system is asked to read ahead of those that are loaded.
READ_AHEAD = 16

_log = get_logger(__name__)


class Ahead:
    """Chooses units to load, in slots of `rooms`, by their `states` and `uses`; `tiered`: home units come and go.
    `num_pending`: units that are certain to be asked for and were not there when it was last looked."""

    def __init__(self, rooms: Rooms, states: UnitStates, uses: Uses, source: UnitSource, tiered: bool) -> None:
        self._rooms, self._states, self._uses, self._source, self._tiered = rooms, states, uses, source, tiered
        self.num_pending = 0
        #: Of how many layers more an engine must come before there is something to load; 0 where that may be now.
        self._idle_layers = 0
        #: Units that may be begun to be loaded before the system is told what comes next.
        self._until_read_ahead = 0

    @property
    def may_be_due(self) -> bool:
        return self._idle_layers <= 0

    def told_more(self) -> None:
        """An engine has said what it will ask for."""
        self._idle_layers = self._until_read_ahead = 0

    def changed(self) -> None:
        """A unit has left, or an engine."""
        self._idle_layers = 0

    def came_on(self, num_layers: int) -> None:
        """An engine is so many layers farther."""
        self._idle_layers -= num_layers

    def begin(self, lead: int, stalled: bool, take: Callable[[Unit, Unit | None], Load]) -> list[Load]:
        """Return what to load now, each begun by `take`, which gets the unit and who leaves for it.

        Once something is used within `lead` layers, all is begun that is within one more: each time that one thread
        wakes and works costs the one that computes a tenth of a millisecond, as both want the interpreter's lock.
        """
        loads = list[Load]()
        if not self.may_be_due:
            return loads
        outlook = self._uses.look()
        if self._until_read_ahead <= 0:
            self._read_ahead(outlook)
        try:
            while len(loads) < self._at_once and (chosen := self._choose(outlook, lead + 1, stalled)) is not None:
                loads.append(take(*chosen))
        except Exception:
            if not loads:
                raise
            _log.exception("choosing what to fetch ahead failed")  # what has its slot must come all the same
        self._until_read_ahead -= len(loads)
        known_LR = self._known(outlook)
        self.num_pending = int((known_LR < FAR // 2).sum())
        if self._tiered and len(loads) < self._at_once:  # else there may be more that is due
            self._idle_layers = int(known_LR.min(initial=FAR)) - lead
        return loads

    @cached_property
    def _at_once(self) -> int:
        """How many units are begun at once: a quarter of the slots at most, and of large ones fewer, lest whoever is in
        need of one waits for several. Of what is loaded for others one: it may turn out not to be asked for."""
        if not self._tiered:
            return 1
        slot_bytes = max((room.pool.slot_bytes for room in self._rooms), default=1)
        return max(1, min(AT_ONCE, self._rooms.most_units // 2, AT_ONCE_BYTES // slot_bytes))

    def _choose(self, outlook: Outlook, lead: int, stalled: bool) -> tuple[Unit, Unit | None] | None:
        if self._tiered:
            return self._states.next_fetch(outlook, lead)
        unit = self._states.next_guest(outlook, self._uses, stalled)
        return None if unit is None else (unit, None)

    def _read_ahead(self, outlook: Outlook) -> None:
        self._until_read_ahead = READ_AHEAD // 2
        known_LR = self._known(outlook)
        pending = np.flatnonzero(known_LR < FAR // 2)
        if len(pending):
            first = pending[np.argsort(known_LR.reshape(-1)[pending], kind="stable")[:READ_AHEAD]]
            self._source.read_ahead([divmod(int(place), known_LR.shape[1]) for place in first])

    def _known(self, outlook: Outlook) -> np.ndarray:
        """Layers [L, R] until the next certain use of what could be loaded; `FAR` for all else."""
        return np.where(self._states.to_fetch(), outlook.known_LR, FAR)
