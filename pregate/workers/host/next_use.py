"""When each unit is used next, and what follows from it: whom to evict, what to fetch. NumPy, no clock, no thread.

The store of a host decides with it, and `pregate bench cache` replays with it.

Time is counted in layers: layer l of step s is at s * L + l. Shape letters: H steps, L layers, R routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pregate.workers.link.expected import SURE, Expected

Unit = tuple[int, int]
#: Farther than any use that is known.
FAR = 1 << 40
#: How often a unit is used is averaged over about 1 / (1 - DECAY) steps. It counts in full where nothing is forecast;
#: else it tells units apart that are hardly likely.
DECAY, _RATE_WEIGHT = 0.9, 0.01


class NextUse:
    """What one engine has planned and expects of `num_layers` layers of `num_routed` experts, and where it is."""

    def __init__(self, num_layers: int, num_routed: int) -> None:
        #: Where the engine is, and how often what is said here has changed.
        self.now = self.version = 0
        self._layers = np.arange(num_layers)
        self._step = -1
        self._planned_LR = np.zeros((num_layers, num_routed), dtype=bool)
        nothing_LR = np.zeros((num_layers, num_routed), dtype=np.uint8)
        self._expected = Expected(0, np.zeros((0, num_layers, num_routed), dtype=bool), nothing_LR)
        self._told = False
        self._times: Times | None = None

    def plan(self, step: int, used_LR: np.ndarray) -> None:
        """Step `step` runs next and uses these units, and no others."""
        self._step, self._planned_LR = step, used_LR.copy()
        self.reach(step, 0)

    def expect(self, expected: Expected) -> None:
        """Steps from `expected.step` on use these. Where a step is left out before them, the planned one has ended."""
        if expected.step > self._step + 1:
            self._planned_LR[:] = False
        self._expected = Expected(expected.step, expected.known_HLR.copy(), expected.likely_LR)
        self._told = True
        self._change()
        if self._step < 0:  # nothing has run yet: it begins there
            self.reach(expected.step, 0)

    def reach(self, step: int, layer: int) -> int:
        """The engine is at a layer; those before it are done. Returns how many layers farther that is than before."""
        before = self.now
        self._change()
        self.now = max(before, step * len(self._layers) + layer)
        return self.now - before

    def done(self, step: int, layer: int, experts: np.ndarray) -> None:
        """The engine has used these units of a layer in this step."""
        ahead = step - self._expected.step
        if step == self._step:
            self._planned_LR[layer, experts] = False
        elif 0 <= ahead < len(self._expected.known_HLR):
            self._expected.known_HLR[ahead, layer, experts] = False
        self._change()

    def _change(self) -> None:
        self._times, self.version = None, self.version + 1

    def times(self) -> Times:
        """Return when units are used next."""
        if self._times is None:
            ahead, num_layers = self._expected, len(self._layers)
            steps_H, uses_HLR = self._steps()
            at_HL = steps_H[:, None] * num_layers + self._layers
            to_come_HLR = uses_HLR & (at_HL >= self.now)[:, :, None]
            next_LR = to_come_HLR.argmax(axis=0)
            known = np.where(to_come_HLR.any(axis=0), at_HL[next_LR, self._layers[:, None]], FAR)
            # Without plans, where gates decide, the step that runs is one of those of which not all is known.
            turn_L = max(self._step + 1, ahead.step, self.now // num_layers) * num_layers + self._layers
            turn_L += (turn_L < self.now) * num_layers
            self._times = Times(known - self.now, turn_L - self.now, ahead.likely_LR, self._told)
        return self._times

    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """The steps of which uses are known, ascending, int64 [H], and these uses, bool [H, L, R]."""
        ahead = self._expected
        later = max(0, self._step + 1 - ahead.step)
        steps_H = np.array([self._step, *range(ahead.step + later, ahead.step + len(ahead.known_HLR))])
        return steps_H, np.concatenate([self._planned_LR[None], ahead.known_HLR[later:]])


@dataclass(frozen=True, eq=False)
class Times:
    """In layers from the one that runs: int64 `known_LR`, the next use that is certain, about `FAR` where there is
    none; `turn_L`, when a layer runs next in a step of which not all is known. `likely_LR`: as `Expected` has it;
    `told` says that there is such a forecast, of all that run."""

    known_LR: np.ndarray
    turn_L: np.ndarray
    likely_LR: np.ndarray
    told: bool


class Uses:
    """All engines of a host together, and how often and how long ago each unit was used by any."""

    def __init__(self, num_layers: int, num_routed: int) -> None:
        self._shape = (num_layers, num_routed)
        self._engines: dict[str, NextUse] = {}
        self._last_LR = np.full(self._shape, -1, dtype=np.int64)
        self._rate_LR = np.zeros(self._shape)
        self._count = 0
        self._seen: tuple[list[int], Outlook] | None = None

    def of(self, engine: str) -> NextUse:
        if engine not in self._engines:
            self._engines[engine] = NextUse(*self._shape)
        return self._engines[engine]

    def forget(self, engine: str) -> None:
        self._engines.pop(engine, None)
        self._seen = None

    def used(self, layers: np.ndarray | int, experts: np.ndarray) -> None:
        """Note that these units are used now."""
        self._last_LR[layers, experts] = self._count + 1
        self._rate_LR[layers] *= DECAY
        self._rate_LR[layers, experts] += 1 - DECAY
        self._count += 1  # last: whoever looks meanwhile looks again

    def look(self) -> Outlook:
        """Return what is known at this moment."""
        version = [self._count, *(engine.version for engine in self._engines.values())]
        if self._seen is None or self._seen[0] != version:
            self._seen = version, self._look()
        return self._seen[1]

    def _look(self) -> Outlook:
        known = np.full(self._shape, FAR)
        distance = FAR + self._count - self._last_LR
        for engine in self._engines.values():
            times = engine.times()
            known = np.minimum(known, times.known_LR)
            distance = np.minimum(distance, np.where(times.known_LR < FAR // 2, times.known_LR, self._guess(times)))
        return Outlook(known, distance)

    def wanted(self) -> np.ndarray:
        """Return bool [L, R]: what some engine is certain to ask for, or may."""
        wanted_LR = np.zeros(self._shape, dtype=bool)
        for times in map(NextUse.times, self._engines.values()):
            wanted_LR |= (times.known_LR < FAR // 2) | (times.likely_LR > 0)
        return wanted_LR

    def _guess(self, times: Times) -> np.ndarray:
        """Layers until a unit's next use, on average, if each step uses it as likely as is forecast, else as lately."""
        share_LR = self._rate_LR
        if times.told:
            share_LR = np.minimum(times.likely_LR / SURE + _RATE_WEIGHT * self._rate_LR, 1.0)
        steps_LR = 1 / np.maximum(share_LR, 1e-6) - 1
        guess_LR = times.turn_L[:, None] + (len(times.turn_L) * steps_LR).astype(np.int64)
        # Where nothing runs that could surprise, what is not known to be used comes after all that is.
        return guess_LR + (FAR // 2 if times.told and not times.likely_LR.any() else 0)


@dataclass(frozen=True, eq=False)
class Outlook:
    """int64 [L, R], in layers: `known_LR` until the next use that is certain, `distance_LR` until the next that is
    certain or expected. It decides for a pool of slots, whose units are given as masks [L, R]."""

    known_LR: np.ndarray
    distance_LR: np.ndarray

    def farthest(self, among_LR: np.ndarray) -> Unit | None:
        """Return the unit to evict among these, None where there is none."""
        if not among_LR.any():
            return None
        return _unit(np.where(among_LR, self.distance_LR, np.iinfo(np.int64).min).argmax(), among_LR.shape[1])

    def nearest(self, among_LR: np.ndarray) -> Unit | None:
        """Return the one of these units that is used next, None where there is none."""
        if not among_LR.any():
            return None
        return _unit(np.where(among_LR, self.distance_LR, np.iinfo(np.int64).max).argmin(), among_LR.shape[1])

    def fetch(
        self, absent_LR: np.ndarray, may_go_LR: np.ndarray, num_free: int, lead: int
    ) -> tuple[Unit, Unit | None] | None:
        """Return what to fetch ahead and what leaves for it (None: a slot is free), or None if nothing should be.

        Only what is surely used within `lead` layers is fetched, the nearest first, and nothing leaves for it that is
        used sooner. A larger lead hides more of a load, and costs slots in which units could have stayed.
        """
        ahead_LR = np.where(absent_LR, self.known_LR, FAR)
        unit = _unit(ahead_LR.argmin(), ahead_LR.shape[1])
        if ahead_LR[unit] > lead:
            return None
        if num_free:
            return unit, None
        leaving = self.farthest(may_go_LR)
        if leaving is None or self.distance_LR[leaving] <= ahead_LR[unit]:
            return None
        return unit, leaving


def _unit(index: np.intp, num_experts: int) -> Unit:
    return divmod(int(index), num_experts)
