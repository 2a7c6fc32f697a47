"""The units a host holds: in pools of slots, one per expert width, each read alone when it is wanted.

Shape letters: L layers, R routed experts, U units asked for, E units of a layer, shared ones first.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pregate.base.errors import PregateError, UserError
from pregate.base.log import get_logger
from pregate.kernels.weights import Layout
from pregate.model.checkpoint import CheckpointReader
from pregate.workers.host.copies import Copies
from pregate.workers.host.loads import Load, Room
from pregate.workers.host.next_use import FAR, Outlook, Unit, Uses
from pregate.workers.host.residency import resident_share
from pregate.workers.host.slots import SlotMap, SlotPool
from pregate.workers.host.slots import Unit as Weights
from pregate.workers.host.source import UnitSource
from pregate.workers.link.expected import Expected
from pregate.workers.link.protocol import CacheCounters

#: Units that the system is asked to read ahead of those that are loaded.
READ_AHEAD = 16
#: Longest wait for a unit that another thread loads.
LOAD_TIMEOUT_S = 120.0

_log = get_logger(__name__)


class UnitStore:
    """The units this host is home to, and those it was asked for besides.

    All home units are held in order and for good, unless there are only `resident` slots for them; then they come and
    go. What comes and goes: a unit that is asked for and not held is read then and there (a miss); the one leaves that
    is used last, as far as engines have said, else the one not asked for longest. Where nothing else does, others of
    this host's units have room for `spare_slots` of each width, and always for those of one layer at once.

    Where home units all stay, others that engines expect to ask for are loaded ahead into slots that are free.

    `reserve_shared` leaves room for every layer's shared units. `versions` int64 [L] count how often a layer's slots
    changed. One thread computes; others may load ahead (`next_fetch`, `finish`).
    """

    def __init__(
        self,
        reader: CheckpointReader,
        units: Iterable[Unit],
        layout: Layout,
        *,
        resident: float | None = None,
        source: UnitSource | None = None,
        copies: Copies | None = None,
        spare_slots: int = 0,
        reserve_shared: bool = False,
    ) -> None:
        self._reader, self._cuts = reader, reader.config.cuts
        self._source, self._copies = source or UnitSource(reader), copies or Copies(torch.device("cpu"))
        units = sorted(set(units))
        self._first_L = np.array([cut.num_shared for cut in self._cuts])  # of the routed units, in the map
        self._routed_L = np.array([cut.num_routed for cut in self._cuts])
        self._map = SlotMap.empty(len(self._cuts), max(self._first_L + self._routed_L, default=0))
        self.versions, self.stats = self._map.versions, CacheCounters()
        shape = (len(self._cuts), int(self._routed_L.max(initial=0)))
        self.uses, self._changed = Uses(*shape), threading.Condition()
        self._held_LR, self._coming_LR, self._fresh_LR, self._in_use_LR, self._fixed_LR, self._failed_LR = (
            np.zeros(shape, dtype=bool) for _ in range(6)
        )
        self._at: tuple[str, int] | None = None
        self._asked: tuple[int, np.ndarray] | None = None
        self._stalled = False  # the compute thread waits for units
        self._pools: dict[int, SlotPool] = {}
        self._rooms: dict[int, Room] = {}
        self._spare_slots = spare_slots
        sizes = [reader.unit_bytes(layer) for layer, _ in units if 0 <= layer < len(self._cuts)]
        share = resident_share(resident, sizes)
        #: Whether home units come and go.
        self.tiered = share < 1
        homes = Counter(layer for layer, _ in units)
        for width in dict.fromkeys(cut.expert_width for cut in self._cuts if cut.num_routed):
            layers = [n for n, cut in enumerate(self._cuts) if cut.num_routed and cut.expert_width == width]
            most = max(2, int(share * sum(homes[n] for n in layers) + 1e-6))
            num_slots = most if self.tiered else self._num_slots(layers, homes)
            shared = sum(self._cuts[n].num_shared for n in layers) * reserve_shared
            self._pools[width] = SlotPool(layout, width, reader.hidden_size, num_slots + shared, self._map)
            mask = np.zeros(shape, dtype=bool)
            for layer in layers:
                mask[layer, : self._cuts[layer].num_routed] = True
            self._rooms[width] = Room(self._pools[width], mask, num_slots)
        self._num_fixed = 0 if self.tiered else len(units)
        for layer, expert in units:
            self._check_exists(layer, np.array([expert]))
            if not self.tiered or self._num_free(self._room(layer)):
                self.carry_out(self._take((layer, expert), ahead=False))
                self._fixed_LR[layer, expert] = not self.tiered

    def _num_slots(self, layers: Iterable[int], homes: Mapping[int, int]) -> int:
        """How many slots layers of one width want that have so many units at home here: those, and guests."""
        foreign = [int(self._routed_L[n]) - homes[n] for n in layers]
        return sum(homes[n] for n in layers) + min(max(self._spare_slots, *foreign, 0), sum(foreign))

    def rehome(self, units: Iterable[Unit]) -> list[Load]:
        """Be home to these units from now on, and to no others: those leave. Between two uses of what is held.

        Returns what is to be read, each for `carry_out`. Slots are added where they are too few, never taken away;
        where home units come and go there are as many as before, and nothing is read ahead. PregateError where what is
        loaded ahead does not come.
        """
        if self.tiered:
            return []
        wanted_LR = np.zeros(self.shape, dtype=bool)
        for layer, expert in units:
            self._check_exists(layer, np.array([expert]))
            wanted_LR[layer, expert] = True
        with self._changed:
            if not self._changed.wait_for(lambda: not self._coming_LR.any(), LOAD_TIMEOUT_S):
                raise PregateError(f"units that are loaded ahead have not come within {LOAD_TIMEOUT_S:g} s")
            for layer, expert in np.argwhere(self._fixed_LR & self._held_LR & ~wanted_LR).tolist():
                self._evict((layer, expert))
            self._fixed_LR, self._num_fixed = wanted_LR, int(wanted_LR.sum())
            homes = dict(enumerate(wanted_LR.sum(axis=1).tolist()))
            for width, room in self._rooms.items():
                more = self._num_slots(np.flatnonzero(room.mask_LR.any(axis=1)).tolist(), homes) - room.num_slots
                if more > 0:
                    room.pool.grow(more)
                    self._rooms[width] = replace(room, num_slots=room.num_slots + more)
            absent = np.argwhere(wanted_LR & ~self._held_LR).tolist()
            loads = [self._make_room((layer, expert)) for layer, expert in absent]
        return [load for load in loads if load is not None]

    @property
    def shape(self) -> tuple[int, int]:
        """[L, R] of the masks and tables of units."""
        return self._held_LR.shape  # type: ignore[return-value]

    @property
    def held(self) -> np.ndarray:
        """Bool [L, R], the units that are held or on their way."""
        return self._held_LR | self._coming_LR

    @property
    def complete(self) -> bool:
        """True while every routed unit of the checkpoint is held, and stays."""
        return not self.tiered and self.stats.num_units == int(self._routed_L.sum())

    @property
    def most_units(self) -> int:
        """Return of how many units of one layer there is room for twice: they can be in use while others are loaded."""
        return min((room.num_slots // 2 for room in self._rooms.values()), default=0)

    # ---- what is held ----

    def slots(self, layers: np.ndarray | int, expert_ids: np.ndarray) -> np.ndarray:
        """Return int32 [U]: the slot of each unit, -1 for one that is not held or does not exist. Reads nothing."""
        layers = np.asarray(layers)
        here = np.where((layers >= 0) & (layers < len(self._cuts)), layers, 0)
        exists = (here == layers) & (expert_ids >= 0) & (expert_ids < self._routed_L[here])
        found = self._map.slots[here, np.where(exists, self._first_L[here] + expert_ids, 0)]
        if exists.all() and not self.tiered and self.stats.num_units > self._num_fixed:
            self.uses.used(here, expert_ids)  # guests: the longest unused goes
        return found if exists.all() else np.where(exists, found, -1).astype(np.int32)

    def weights(self, layer: int) -> Any:
        """Return the stack that a layer's slots are in."""
        return self._pool(layer).weights

    def unit_slots(self, layer: int) -> np.ndarray:
        """Return int32 [E]: slots of the shared units, where they are held here, then of all routed ones, -1 for
        absent."""
        first = int(self._first_L[layer])
        row = self._map.slots[layer, : first + self._routed_L[layer]]
        return row[0 if first and row[0] >= 0 else first :].copy()

    def units(self) -> list[Unit]:
        """Return the routed units held, in order."""
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(self._held_LR)]

    def hold_shared(self, layer: int, shared: Sequence[Weights]) -> None:
        """Put a layer's shared units beside its routed ones, once. They do not count as units of this host."""
        if self._map.slots[layer, 0] >= 0:
            return  # another engine of this process gave them: the same checkpoint, the same units
        pool = self._pool(layer)
        with self._changed:
            for unit, weights in enumerate(shared):
                if not pool.num_free:
                    pool.grow(len(shared) - unit)
                pool.put(layer, unit, weights)
        self.stats.held_bytes += len(shared) * pool.slot_bytes

    # ---- what is asked for ----

    def plan(self, engine: str, step: int, used_LR: np.ndarray) -> None:
        """Take in which units an engine's next step will ask for."""
        with self._changed:
            self.uses.of(engine).plan(step, used_LR)
            self._changed.notify_all()

    def expect(self, engine: str, expected: Expected) -> None:
        """Take in what an engine expects to ask for later, between two uses of what is held. ValueError where it is of
        another model."""
        expected.check(*self._held_LR.shape)
        with self._changed:
            self.uses.of(engine).expect(expected)
            if not self.tiered:
                self._make_way()
            self._changed.notify_all()

    def _make_way(self) -> None:
        """Let guests go that nobody expects to ask for, where those who lack would find no free slot."""
        wanted_LR, outlook = self.uses.wanted(), self.uses.look()
        for room in self._rooms.values():
            lacking = int((wanted_LR & ~self._held_LR & ~self._coming_LR & room.mask_LR).sum())
            while lacking > self._num_free(room):
                leaving = outlook.farthest(self._may_go(room) & ~wanted_LR)
                if leaving is None:
                    break
                self._evict(leaving)

    def forget(self, engine: str) -> None:
        with self._changed:
            self.uses.forget(engine)
            self._at = None

    def reach(self, engine: str, step: int, layer: int) -> None:
        """Take in where an engine is; what is looked up next is its."""
        with self._changed:
            self._at = engine, step
            self.uses.of(engine).reach(step, layer)

    def waves(self, layer: int, expert_ids: np.ndarray) -> list[np.ndarray]:
        """Return the places in `expert_ids` that can be acquired at a time: all, unless there are too few slots.

        Then a wave takes half of them, so that the next wave's units can come meanwhile; what is held goes first.
        """
        num_slots, size = self._room(layer).num_slots, len(expert_ids)
        if not self.tiered or size <= num_slots:
            return [np.arange(size)]
        ordered = np.argsort(~self._held_LR[layer, expert_ids], kind="stable")
        size = max(1, num_slots // 2)
        return [np.sort(ordered[at : at + size]) for at in range(0, len(ordered), size)]

    def lookup(self, layer: int, expert_ids: np.ndarray) -> tuple[np.ndarray, Any]:
        """Return the slots of these experts (ascending ids) and the weights they lie in; reads what is missing.

        They stay at least until `release`, or the next lookup, and so must fit into the slots (`waves`). Raises the
        checkpoint's UserError for a unit that does not exist, CheckpointError for one that cannot be read.
        """
        self._check_exists(layer, expert_ids)
        with self._changed:
            self.uses.used(layer, expert_ids)
            self._in_use_LR[:] = False
            self._in_use_LR[layer, expert_ids] = True
            self._fresh_LR[layer, expert_ids] = False
            self._asked = layer, expert_ids
            held, coming = self._held_LR[layer, expert_ids], self._coming_LR[layer, expert_ids]
        self.stats.hits += int(held.sum())
        if not held.all():
            self.stats.misses += len(held) - int(held.sum())
            begun_s, self._stalled = time.perf_counter(), True
            try:  # first what nobody has begun to load
                for expert in (*expert_ids[~held & ~coming].tolist(), *expert_ids[~held & coming].tolist()):
                    self._bring((layer, expert))
            finally:
                self._stalled = False
                self.stats.stall_s += time.perf_counter() - begun_s
        return self.slots(layer, expert_ids), self.weights(layer)

    def release(self) -> None:
        """What was looked up last is not in use any more, once the device has done what it was asked for."""
        self._copies.used()
        with self._changed:
            self._in_use_LR[:] = False
            if self._at is not None and self._asked is not None:
                engine, step = self._at
                self.uses.of(engine).done(step, *self._asked)
            self._changed.notify_all()

    def _check_exists(self, layer: int, expert_ids: np.ndarray) -> None:
        known = self._routed_L[layer] if 0 <= layer < len(self._cuts) else 0
        for expert in expert_ids[(expert_ids < 0) | (expert_ids >= known)].tolist():
            raise UserError(f"unit ({layer}, {expert}): not in this checkpoint")

    # ---- loading ----

    def next_fetch(self, lead: int, timeout_s: float = 0.0) -> Load | None:
        """Return what to load ahead now, with its slot, waiting up to `timeout_s` for there to be something; else None.
        `finish` carries it out."""
        with self._changed:
            load = self._begin_fetch(lead)
            if load is None and timeout_s and self._changed.wait(timeout_s):
                load = self._begin_fetch(lead)
            return load

    def _begin_fetch(self, lead: int) -> Load | None:
        outlook = self.uses.look()
        absent_LR = ~(self._held_LR | self._coming_LR | self._failed_LR)
        self._read_ahead(outlook, absent_LR)
        chosen: list[tuple[int, Unit, Unit | None]] = []
        for room in self._rooms.values():
            if self.tiered:
                found = outlook.fetch(absent_LR & room.mask_LR, self._may_go(room), self._num_free(room), lead)
            else:
                found = self._guest(outlook, absent_LR, room)
            if found is not None:
                chosen.append((int(outlook.distance_LR[found[0]]), *found))
        if not chosen:
            return None
        _, unit, leaving = min(chosen)
        if leaving is not None:
            self._evict(leaving)
        return self._take(unit, ahead=True)

    def _guest(self, outlook: Outlook, absent_LR: np.ndarray, room: Room) -> tuple[Unit, Unit | None] | None:
        """Return what to load for another host, into a free slot alone: nothing is known of what the compute thread has
        in use. What is not certain to be asked for waits while that thread reads."""
        wanted_LR = outlook.known_LR < FAR // 2 if self._stalled else self.uses.wanted()
        unit = outlook.nearest(absent_LR & room.mask_LR & wanted_LR)
        return None if unit is None or not self._num_free(room) else (unit, None)

    def finish(self, load: Load) -> None:
        """Load ahead, and let it be found. A failure is left to whoever asks for the unit."""
        try:
            self.carry_out(load)
        except PregateError as error:
            _log.warning("%s", error)
            self._failed_LR[load.unit] = True

    def wake(self) -> None:
        """Let whoever waits look again."""
        with self._changed:
            self._changed.notify_all()

    def _read_ahead(self, outlook: Outlook, absent_LR: np.ndarray) -> None:
        known = np.where(absent_LR, outlook.known_LR, FAR)
        pending = np.flatnonzero(known < FAR // 2)
        self.stats.num_pending = len(pending)
        if len(pending):
            first = pending[np.argsort(known.reshape(-1)[pending], kind="stable")[:READ_AHEAD]]
            self._source.read_ahead([divmod(int(place), known.shape[1]) for place in first])

    def _bring(self, unit: Unit) -> None:
        """Return when a unit that is in use is held: load it, or wait for the thread that does."""
        deadline_s, load = time.monotonic() + LOAD_TIMEOUT_S, None
        with self._changed:
            while load is None:
                if self._held_LR[unit]:
                    return
                if not self._coming_LR[unit]:
                    load = self._make_room(unit)
                if load is None:
                    if time.monotonic() > deadline_s:
                        raise PregateError(f"unit {unit} has not come within {LOAD_TIMEOUT_S:g} s")
                    self._changed.wait(LOAD_TIMEOUT_S)
        self.carry_out(load)
        self._failed_LR[unit] = False

    def _make_room(self, unit: Unit) -> Load | None:
        """Take a slot for a unit that is wanted now; None while the only ones that could leave are still coming."""
        room = self._room(unit[0])
        if not self._num_free(room):
            leaving = self.uses.look().farthest(self._may_go(room))
            if leaving is None:
                return None
            self._evict(leaving)
        return self._take(unit, ahead=False)

    def _may_go(self, room: Room) -> np.ndarray:
        return self._held_LR & room.mask_LR & ~self._fixed_LR & ~self._in_use_LR

    def _num_free(self, room: Room) -> int:
        return room.num_slots - int(((self._held_LR | self._coming_LR) & room.mask_LR).sum())

    def _take(self, unit: Unit, *, ahead: bool) -> Load:
        layer, expert = unit
        pool = self._pool(layer)
        self._coming_LR[unit] = True
        self._fresh_LR[unit] = ahead and not self._in_use_LR[unit]
        return Load(unit, pool, pool.take(layer, int(self._first_L[layer]) + expert), ahead)

    def carry_out(self, load: Load) -> None:
        """Read a unit into the slot that was taken for it, and let it be found."""
        try:
            weights = self._source.read(load.unit, self._farthest)
            with self._copies.copying():
                load.pool.write(load.slot, weights)
        except BaseException:
            with self._changed:
                self._coming_LR[load.unit] = self._fresh_LR[load.unit] = False
                load.pool.give_back(load.slot)
                self._changed.notify_all()
            raise
        num_bytes, stats = weights[0].nbytes + weights[1].nbytes, self.stats
        with self._changed:
            load.pool.publish(load.slot)
            self._coming_LR[load.unit], self._held_LR[load.unit] = False, True
            stats.num_units += 1
            stats.units_read += 1
            stats.read_bytes += num_bytes
            stats.held_bytes += load.pool.slot_bytes
            stats.prefetched_bytes += num_bytes * load.ahead
            self._changed.notify_all()

    def _farthest(self, units: Iterable[Unit]) -> Unit:
        with self._changed:
            distance_LR = self.uses.look().distance_LR
        return max(units, key=lambda unit: distance_LR[unit])

    def _evict(self, unit: Unit) -> None:
        layer, expert = unit
        pool = self._pool(layer)
        pool.evict(layer, int(self._first_L[layer]) + expert)
        self.stats.wasted_bytes += self._reader.unit_bytes(layer) * int(self._fresh_LR[unit])
        self._held_LR[unit] = self._fresh_LR[unit] = False
        self.stats.num_units -= 1
        self.stats.evictions += 1
        self.stats.held_bytes -= pool.slot_bytes

    def _pool(self, layer: int) -> SlotPool:
        return self._pools[self._cuts[layer].expert_width]

    def _room(self, layer: int) -> Room:
        return self._rooms[self._cuts[layer].expert_width]
