"""The policies that a replay compares: each says how far away a unit is, and the farthest goes.

`lookahead` is what a host runs (`workers/host/next_use.py`); `known-step` is the same told of the current step alone,
`sees 1` and `sees 4` the same told of so many steps more than can be known, `optimal` of all that will come.

Shape letters: S steps, L layers, R routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

import numpy as np

from pregate.cli.cache.recording import Recording
from pregate.workers.host.next_use import FAR, Outlook, Uses


class Policy(Protocol):
    """Follows a replay, step by step and layer by layer."""

    def begin(self, step: int) -> None:
        """Step `step` is about to run."""
        ...

    def reach(self, step: int, layer: int) -> None:
        """A layer of it runs now; its units count as used."""
        ...

    def look(self) -> Outlook:
        """Return what the policy holds of the future."""
        ...


class _Ranked:
    """A policy without a future: units lie `distance_LR` away and nothing is fetched ahead."""

    def __init__(self, recording: Recording, seed: int) -> None:
        self.recording, self.random = recording, np.random.default_rng(seed)
        self.distance_LR = np.zeros(recording.used_SLR.shape[1:], dtype=np.int64)
        self.count = 0

    def begin(self, step: int) -> None:
        pass

    def reach(self, step: int, layer: int) -> None:
        self.count += 1
        self.note(layer, self.recording.used_SLR[step, layer])

    def note(self, layer: int, used_R: np.ndarray) -> None:
        """Take in what a layer used."""

    def look(self) -> Outlook:
        never = np.full(self.distance_LR.shape, FAR)
        return Outlook(never, self.distance_LR - self.distance_LR.min())


class Random(_Ranked):
    """Any unit goes."""

    def note(self, layer: int, used_R: np.ndarray) -> None:
        self.distance_LR = self.random.integers(0, 1 << 20, self.distance_LR.shape)


class LeastRecent(_Ranked):
    """The unit that was not used for longest goes."""

    def note(self, layer: int, used_R: np.ndarray) -> None:
        self.distance_LR[layer, used_R] = -self.count


class LeastFrequent(_Ranked):
    """The unit that was used least goes."""

    def note(self, layer: int, used_R: np.ndarray) -> None:
        self.distance_LR[layer] -= used_R


class HotSet(_Ranked):
    """The units that are used most in the whole recording stay."""

    def __init__(self, recording: Recording, seed: int) -> None:
        super().__init__(recording, seed)
        self.distance_LR = -recording.used_SLR.sum(axis=0)


class NextUsePolicy:
    """The unit goes whose next use lies farthest, as far as `expects` says; what a host does. `sees`: so many steps are
    known that nobody can know, which says what a better forecast could gain."""

    def __init__(self, recording: Recording, expects: bool, sees: int = 0) -> None:
        self._recording, self._expects, self._sees = recording, expects, sees
        self._uses = Uses(*recording.used_SLR.shape[1:])
        self._next = self._uses.of("")

    def begin(self, step: int) -> None:
        self._next.plan(step, self._recording.used_SLR[step])
        if self._expects:
            expected, seen_HLR = self._recording.expected(step), self._recording.used_SLR[step + 1 :][: self._sees]
            known_HLR = np.concatenate([seen_HLR, expected.known_HLR[len(seen_HLR) :]])
            self._next.expect(replace(expected, known_HLR=known_HLR))

    def reach(self, step: int, layer: int) -> None:
        experts = np.flatnonzero(self._recording.used_SLR[step, layer])
        self._next.reach(step, layer)
        self._next.done(step, layer, experts)
        self._uses.used(layer, experts)

    def look(self) -> Outlook:
        return self._uses.look()


class Optimal:
    """Belady's choice: the next use of all, as it will be."""

    def __init__(self, recording: Recording) -> None:
        num_steps, num_layers, num_routed = recording.used_SLR.shape
        at = np.full((num_steps + 1, num_layers, num_routed), FAR)
        times = np.arange(num_layers)[:, None]
        for step in range(num_steps - 1, -1, -1):
            at[step] = np.where(recording.used_SLR[step], step * num_layers + times, at[step + 1])
        self._at, self._num_layers, self._now = at, num_layers, (0, -1)

    def begin(self, step: int) -> None:
        self._now = (step, -1)

    def reach(self, step: int, layer: int) -> None:
        self._now = (step, layer)

    def look(self) -> Outlook:
        step, layer = self._now
        at_LR = self._at[step].copy()
        at_LR[: layer + 1] = self._at[step + 1, : layer + 1]
        at_LR -= step * self._num_layers + layer
        return Outlook(at_LR, at_LR)


#: By name, each made from a recording and a seed.
POLICIES: Mapping[str, Callable[[Recording, int], Policy]] = MappingProxyType(
    {
        "random": Random,
        "lru": LeastRecent,
        "lfu": LeastFrequent,
        "hot set": HotSet,
        "known step": lambda recording, _: NextUsePolicy(recording, expects=False),
        "lookahead": lambda recording, _: NextUsePolicy(recording, expects=True),
        "sees 1": lambda recording, _: NextUsePolicy(recording, expects=True, sees=1),
        "sees 4": lambda recording, _: NextUsePolicy(recording, expects=True, sees=4),
        "optimal": lambda recording, _: Optimal(recording),
    }
)
