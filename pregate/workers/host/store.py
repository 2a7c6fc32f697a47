"""The units a host holds: in pools of slots, one per expert width, each read alone when it is wanted.

Shape letters: L layers, R routed experts, U units asked for, E units of a layer, shared ones first.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from pregate.base.errors import CheckpointError, DataLossError, PregateError, UserError
from pregate.base.log import get_logger
from pregate.kernels.weights import Layout
from pregate.model.checkpoint import CheckpointReader
from pregate.workers.host.ahead import Ahead
from pregate.workers.host.copies import Copies
from pregate.workers.host.next_use import Unit, Uses
from pregate.workers.host.rooms import Load, Rooms
from pregate.workers.host.slots import Unit as Weights
from pregate.workers.host.source import UnitSource
from pregate.workers.host.unit_states import UnitStates
from pregate.workers.link.expected import Expected
from pregate.workers.link.protocol import CacheCounters

#: Longest wait for a unit that another thread loads.
LOAD_TIMEOUT_S = 120.0

_log = get_logger(__name__)


class UnitStore:
    """The units this host is home to, and those it was asked for besides: in `rooms`, as `states` says.

    All home units are held in order and for good, unless there are slots for a `share` of them alone; then they come
    and go. What comes and goes: a unit that is asked for and not held is read then and there (a miss); the one leaves
    that is used last, as far as engines have said, else the one not asked for longest. Where nothing else does, others
    of this host's units have room for `spare_slots` of each width, and always for those of one layer at once.

    Where home units all stay, others that engines expect to ask for are loaded ahead into slots that are free.

    `reserve_shared` leaves room for every layer's shared units. `versions` int64 [L] count how often a layer's slots
    changed. One thread computes; others may load ahead (`next_fetches`, `finish`).
    """

    def __init__(
        self,
        reader: CheckpointReader,
        units: Iterable[Unit],
        layout: Layout,
        *,
        share: float = 1.0,
        source: UnitSource | None = None,
        copies: Copies | None = None,
        spare_slots: int = 0,
        reserve_shared: bool = False,
    ) -> None:
        self._reader, units = reader, sorted(set(units))
        self._source, self._copies = source or UnitSource(reader), copies or Copies(torch.device("cpu"))
        #: Whether home units come and go.
        self.tiered = share < 1
        homes = Counter(layer for layer, _ in units)
        self.rooms = Rooms(reader, layout, homes, share=share, spare_slots=spare_slots, reserve_shared=reserve_shared)
        self.states, self._map = UnitStates(self.rooms), self.rooms.map
        self.versions, self.stats = self._map.versions, CacheCounters()
        self.uses, self._changed = Uses(*self.shape), threading.Condition()
        self._at: tuple[str, int] | None = None
        self._asked: tuple[int, np.ndarray] | None = None
        self._stalled = False  # the compute thread waits for units
        self._ahead = Ahead(self.rooms, self.states, self.uses, self._source, self.tiered)
        self._num_fixed = 0 if self.tiered else len(units)
        loads: list[Load] = []
        for layer, expert in units:
            self._check_exists(layer, np.array([expert]))
            if not self.tiered or self.states.num_free(self.rooms.of(layer)):
                loads.append(self._take((layer, expert), ahead=False))
                self.states.fixed_LR[layer, expert] = not self.tiered
        for load in sorted(loads, key=lambda load: reader.file_order(*load.unit)):
            self.carry_out(load)
        self._copies.wait_for((load.pool, load.slot) for load in loads)  # pools may grow before anything is asked for

    def rehome(self, units: Iterable[Unit]) -> list[Load]:
        """Be home to these units from now on, and to no others: those leave. Between two uses of what is held.

        Returns what is to be read, each for `carry_out`. Slots are added where they are too few, never taken away;
        where home units come and go there are as many as before, and nothing is read ahead. PregateError where what is
        loaded ahead does not come.
        """
        if self.tiered:
            return []
        wanted_LR, states = np.zeros(self.shape, dtype=bool), self.states
        for layer, expert in units:
            self._check_exists(layer, np.array([expert]))
            wanted_LR[layer, expert] = True
        with self._changed:
            if not self._changed.wait_for(lambda: not states.coming_LR.any(), LOAD_TIMEOUT_S):
                raise PregateError(f"units that are loaded ahead have not come within {LOAD_TIMEOUT_S:g} s")
            for layer, expert in np.argwhere(states.fixed_LR & states.held_LR & ~wanted_LR).tolist():
                self._evict((layer, expert))
            states.fixed_LR, self._num_fixed = wanted_LR, int(wanted_LR.sum())
            self.rooms.enlarge(dict(enumerate(wanted_LR.sum(axis=1).tolist())))
            absent = np.argwhere(wanted_LR & ~states.held_LR).tolist()
            loads = [self._make_room((layer, expert)) for layer, expert in absent]
        return [load for load in loads if load is not None]

    @property
    def shape(self) -> tuple[int, int]:
        """[L, R] of the masks and tables of units."""
        return self.rooms.shape

    @property
    def held(self) -> np.ndarray:
        """Bool [L, R], the units that are held or on their way."""
        return self.states.there_LR

    @property
    def complete(self) -> bool:
        """True while every routed unit of the checkpoint is held, and stays."""
        return not self.tiered and self.stats.num_units == int(self.rooms.routed_L.sum())

    @property
    def most_units(self) -> int:
        """Return of how many units of one layer there is room for twice: they can be in use while others are loaded."""
        return self.rooms.most_units

    # ---- what is held ----

    def slots(self, layers: np.ndarray | int, expert_ids: np.ndarray) -> np.ndarray:
        """Return int32 [U]: the slot of each unit, -1 for one that is not held or does not exist. Reads nothing."""
        layers = np.asarray(layers)
        here = np.where((layers >= 0) & (layers < self.shape[0]), layers, 0)
        exists = (here == layers) & (expert_ids >= 0) & (expert_ids < self.rooms.routed_L[here])
        found = self._map.slots[here, np.where(exists, self.rooms.first_L[here] + expert_ids, 0)]
        if exists.all() and not self.tiered and self.stats.num_units > self._num_fixed:
            self.uses.used(here, expert_ids)  # guests: the longest unused goes
        return found if exists.all() else np.where(exists, found, -1).astype(np.int32)

    def weights(self, layer: int) -> Any:
        """Return the stack that a layer's slots are in."""
        return self.rooms.of(layer).pool.weights

    def unit_slots(self, layer: int) -> np.ndarray:
        """Return int32 [E]: slots of the shared units, where they are held here, then of all routed ones, -1 for
        absent."""
        first = int(self.rooms.first_L[layer])
        row = self._map.slots[layer, : first + self.rooms.routed_L[layer]]
        return row[0 if first and row[0] >= 0 else first :].copy()

    def units(self) -> list[Unit]:
        """Return the routed units held, in order."""
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(self.states.held_LR)]

    def hold_shared(self, layer: int, shared: Sequence[Weights]) -> None:
        """Put a layer's shared units beside its routed ones, once. They do not count as units of this host."""
        if self._map.slots[layer, 0] >= 0:
            return  # another engine of this process gave them: the same checkpoint, the same units
        pool = self.rooms.of(layer).pool
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
            self._ahead.told_more()
            self._changed.notify_all()

    def expect(self, engine: str, expected: Expected) -> None:
        """Take in what an engine expects to ask for later, between two uses of what is held. ValueError where it is of
        another model."""
        expected.check(*self.shape)
        with self._changed:
            self.uses.of(engine).expect(expected)
            while not self.tiered and (leaving := self.states.guest_to_leave(self.uses)) is not None:
                self._evict(leaving)
            self._ahead.told_more()
            self._changed.notify_all()

    def forget(self, engine: str) -> None:
        with self._changed:
            self.uses.forget(engine)
            self._at = None
            self._ahead.changed()

    def reach(self, engine: str, step: int, layer: int) -> None:
        """Take in where an engine is; what is looked up next is its."""
        with self._changed:
            self._at = engine, step
            self._ahead.came_on(self.uses.of(engine).reach(step, layer))
            if self._ahead.may_be_due:
                self._changed.notify_all()

    def waves(self, layer: int, expert_ids: np.ndarray) -> list[np.ndarray]:
        """Return the places in `expert_ids` that can be acquired at a time: all, unless there are too few slots.

        Then a wave takes half of them, so that the next wave's units can come meanwhile; what is held goes first.
        """
        num_slots, size = self.rooms.of(layer).num_slots, len(expert_ids)
        if not self.tiered or size <= num_slots:
            return [np.arange(size)]
        ordered = np.argsort(~self.states.held_LR[layer, expert_ids], kind="stable")
        size = max(1, num_slots // 2)
        return [np.sort(ordered[at : at + size]) for at in range(0, len(ordered), size)]

    def lookup(self, layer: int, expert_ids: np.ndarray) -> tuple[np.ndarray, Any]:
        """Return the slots of these experts (ascending ids) and the weights they lie in; reads what is missing.

        They stay at least until `release`, or the next lookup, and so must fit into the slots (`waves`). Raises the
        checkpoint's UserError for a unit that does not exist, DataLossError for one that cannot be read.
        """
        self._check_exists(layer, expert_ids)
        states = self.states
        with self._changed:
            self.uses.used(layer, expert_ids)
            states.in_use_LR[:] = False
            states.in_use_LR[layer, expert_ids] = True
            states.fresh_LR[layer, expert_ids] = False
            self._asked = layer, expert_ids
            held, coming = states.held_LR[layer, expert_ids], states.coming_LR[layer, expert_ids]
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
        pool, slots = self.rooms.of(layer).pool, self.slots(layer, expert_ids)
        self.stats.stall_s += self._copies.wait_for((pool, slot) for slot in slots.tolist())
        return slots, pool.weights

    def release(self) -> None:
        """What was looked up last is not in use any more, once the device has done what it was asked for."""
        self._copies.used()
        with self._changed:
            self.states.in_use_LR[:] = False
            if self._at is not None and self._asked is not None:
                engine, step = self._at
                self.uses.of(engine).done(step, *self._asked)
            if self._ahead.may_be_due:  # what is due may have waited for a slot of those in use
                self._changed.notify_all()

    def _check_exists(self, layer: int, expert_ids: np.ndarray) -> None:
        known = self.rooms.routed_L[layer] if 0 <= layer < self.shape[0] else 0
        for expert in expert_ids[(expert_ids < 0) | (expert_ids >= known)].tolist():
            raise UserError(f"unit ({layer}, {expert}): not in this checkpoint")

    # ---- loading ----

    def next_fetches(self, lead: int, timeout_s: float = 0.0) -> list[Load]:
        """Return what to load ahead now, each with its slot, waiting up to `timeout_s` for there to be something.
        `finish` carries each out. `lead`: see `Ahead.begin`."""
        with self._changed:
            loads = self._begin_fetches(lead)
            if not loads and timeout_s and self._changed.wait(timeout_s):
                loads = self._begin_fetches(lead)
            return loads

    def _begin_fetches(self, lead: int) -> list[Load]:
        loads = self._ahead.begin(lead, self._stalled, self._begin_fetch)
        self.stats.num_pending = self._ahead.num_pending
        return loads

    def _begin_fetch(self, unit: Unit, leaving: Unit | None) -> Load:
        if leaving is not None:
            self._evict(leaving)
        return self._take(unit, ahead=True)

    def finish(self, load: Load) -> None:
        """Load ahead, and let it be found. A failure is left to whoever asks for the unit."""
        try:
            self.carry_out(load)
        except Exception as error:
            self.states.failed_LR[load.unit] = True
            if not isinstance(error, PregateError):
                raise
            _log.warning("%s", error)

    def wake(self) -> None:
        """Let whoever waits look again."""
        with self._changed:
            self._changed.notify_all()

    def _bring(self, unit: Unit) -> None:
        """Return when a unit that is in use is held: load it, or wait for the thread that does."""
        deadline_s, load = time.monotonic() + LOAD_TIMEOUT_S, None
        with self._changed:
            while load is None:
                if self.states.held_LR[unit]:
                    return
                if not self.states.coming_LR[unit]:
                    load = self._make_room(unit)
                if load is None:
                    if time.monotonic() > deadline_s:
                        raise PregateError(f"unit {unit} has not come within {LOAD_TIMEOUT_S:g} s")
                    self._changed.wait(LOAD_TIMEOUT_S)
        try:
            self.carry_out(load)
        except CheckpointError as error:  # whoever asked for the unit has done nothing wrong
            raise DataLossError(f"{error}; put the file back as it was and start the hosts again") from error
        self.states.failed_LR[unit] = False

    def _make_room(self, unit: Unit) -> Load | None:
        """Take a slot for a unit that is wanted now; None while the only ones that could leave are still coming."""
        room = self.rooms.of(unit[0])
        if not self.states.num_free(room):
            leaving = self.uses.look().farthest(self.states.may_go(room))
            if leaving is None:
                return None
            self._evict(leaving)
        return self._take(unit, ahead=False)

    def _take(self, unit: Unit, *, ahead: bool) -> Load:
        pool, states = self.rooms.of(unit[0]).pool, self.states
        states.coming_LR[unit] = True
        states.fresh_LR[unit] = ahead and not states.in_use_LR[unit]
        return Load(unit, pool, pool.take(*self.rooms.place(unit)), ahead)

    def carry_out(self, load: Load) -> None:
        """Read a unit into the slot that was taken for it, and let it be found."""
        try:
            out = load.pool.memory_of(load.slot)
            weights = self._source.read(load.unit, self._farthest, out)
            if out is None or any(part is not there for part, there in zip(weights, out, strict=True)):
                with self._copies.copying((load.pool, load.slot)):
                    load.pool.write(load.slot, weights)
                if not self.tiered:  # then nobody asks before a slot is used
                    self._copies.wait_for([(load.pool, load.slot)])
        except BaseException:
            with self._changed:
                self.states.coming_LR[load.unit] = self.states.fresh_LR[load.unit] = False
                load.pool.give_back(load.slot)
                self._changed.notify_all()
            raise
        num_bytes, stats = weights[0].nbytes + weights[1].nbytes, self.stats
        with self._changed:
            load.pool.publish(load.slot)
            self.states.coming_LR[load.unit], self.states.held_LR[load.unit] = False, True
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
        pool, states = self.rooms.of(unit[0]).pool, self.states
        pool.evict(*self.rooms.place(unit))
        self.stats.wasted_bytes += self._reader.unit_bytes(unit[0]) * int(states.fresh_LR[unit])
        states.held_LR[unit] = states.fresh_LR[unit] = False
        self._ahead.changed()
        self.stats.num_units -= 1
        self.stats.evictions += 1
        self.stats.held_bytes -= pool.slot_bytes
