"""Replays of a recording: how many units each policy finds held, and how long it waits for the others.

Shape letters: L layers, R routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pregate.cli.cache.policies import Policy
from pregate.cli.cache.recording import Recording
from pregate.workers.host.next_use import Unit


@dataclass(frozen=True)
class Counts:
    """Uses of units, and those that found theirs held."""

    uses: int
    hits: int

    @property
    def loads(self) -> int:
        return self.uses - self.hits

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.uses, 1)


def count_hits(recording: Recording, policy: Policy, num_held: int) -> Counts:
    """Replay with `num_held` units held between layers, of all layers together.

    A layer's units are used at once; what is missing is loaded, and then units go until no more than `num_held` stay,
    perhaps one that was just loaded (bypass). Nothing is fetched ahead.
    """
    held_LR = np.zeros(recording.used_SLR.shape[1:], dtype=bool)
    uses = hits = 0
    for step, used_LR in enumerate(recording.used_SLR):
        policy.begin(step)
        for layer, used_R in enumerate(used_LR):
            if not used_R.any():
                continue
            policy.reach(step, layer)
            uses += int(used_R.sum())
            hits += int((held_LR[layer] & used_R).sum())
            held_LR[layer] |= used_R
            if held_LR.sum() > num_held:
                distance_LR = np.where(held_LR, policy.look().distance_LR, -1)
                order = np.argsort(distance_LR, axis=None, kind="stable")
                held_LR.reshape(-1)[order[len(order) - (int(held_LR.sum()) - num_held) :]] = False
    return Counts(uses, hits)


@dataclass(frozen=True)
class Timing:
    """Seconds that layers took and seconds they waited for units; loads, and those of units that went unused."""

    compute_s: float
    stall_s: float
    loads: int
    wasted: int


class _Loader:
    """Loads one unit at a time, ahead while there is time, into `num_slots` slots."""

    def __init__(self, policy: Policy, shape: tuple[int, int], num_slots: int, load_s: float, lead: int) -> None:
        self.policy, self.load_s, self.lead, self.num_slots = policy, load_s, lead, num_slots
        self.held_LR, self.fresh_LR, self.in_use_LR = (np.zeros(shape, dtype=bool) for _ in range(3))
        self.ready_s: dict[Unit, float] = {}
        self.free_s = 0.0
        self.loads = self.wasted = 0

    def run_until(self, now_s: float, until_s: float) -> None:
        """Fetch ahead from `now_s` on; no load begins at `until_s` or later."""
        outlook = self.policy.look()
        self.free_s = max(self.free_s, now_s)
        while self.lead and self.free_s < until_s:
            may_go_LR = self.held_LR & ~self.in_use_LR
            for unit, ready_s in self.ready_s.items():
                may_go_LR[unit] &= ready_s <= self.free_s
            free = self.num_slots - int(self.held_LR.sum())
            chosen = outlook.fetch(~self.held_LR, may_go_LR, free, self.lead)
            if chosen is None:
                return
            self._load(*chosen)
            self.fresh_LR[chosen[0]] = True

    def need(self, unit: Unit, now_s: float) -> float:
        """Return when a unit that is used now can be."""
        if not self.held_LR[unit]:
            self.free_s = max(self.free_s, now_s)
            leaving = None
            if self.held_LR.sum() >= self.num_slots:
                leaving = self.policy.look().farthest(self.held_LR & ~self.in_use_LR)
            self._load(unit, leaving)
        self.in_use_LR[unit], self.fresh_LR[unit] = True, False
        return max(now_s, self.ready_s[unit])

    def _load(self, unit: Unit, leaving: Unit | None) -> None:
        if leaving is not None:
            self.held_LR[leaving] = False
            self.wasted += int(self.fresh_LR[leaving])
            self.fresh_LR[leaving] = False
        self.held_LR[unit] = True
        self.free_s += self.load_s
        self.ready_s[unit] = self.free_s
        self.loads += 1


def time_stalls(
    recording: Recording, policy: Policy, num_slots: int, *, load_s: float, layer_s: float, lead: int
) -> Timing:
    """Replay on a clock: a layer takes `layer_s`, a unit `load_s` to load, one after another, up to `lead` layers ahead
    (0: on demand). All units of a layer are in slots at once, so there must be as many as it uses."""
    loader = _Loader(policy, recording.used_SLR.shape[1:], num_slots, load_s, lead)
    now_s = stall_s = compute_s = 0.0
    for step, used_LR in enumerate(recording.used_SLR):
        policy.begin(step)
        for layer, used_R in enumerate(used_LR):
            units = [(layer, int(expert)) for expert in np.flatnonzero(used_R)]
            assert len(units) <= num_slots, f"a layer uses {len(units)} units, there are {num_slots} slots"
            policy.reach(step, layer)
            loader.in_use_LR[:] = False
            for unit in units:
                loader.in_use_LR[unit] = bool(loader.held_LR[unit])
            begun_s = now_s
            for unit in units:
                now_s = loader.need(unit, now_s)
            stall_s += now_s - begun_s
            loader.run_until(now_s, now_s + layer_s)
            now_s, compute_s = now_s + layer_s, compute_s + layer_s
    return Timing(compute_s, stall_s, loader.loads, loader.wasted)
