"""`Tally`: what processes counted that may start anew, so that no sum of theirs falls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import Any


class Tally:
    """Sums of counts by name, over processes. A process that starts anew counts from zero: what the one before had
    counted is kept."""

    def __init__(self) -> None:
        self._ended: defaultdict[Hashable, float] = defaultdict(int)
        self._last: defaultdict[Hashable, dict[Hashable, float]] = defaultdict(dict)

    def take(self, process: Hashable, counts: Mapping[Any, float]) -> None:
        """Take note of what a process counted so far."""
        last = self._last[process]
        for name, value in counts.items():
            if value < (before := last.get(name, 0)):
                self._ended[name] += before
            last[name] = value

    def __getitem__(self, name: Hashable) -> float:
        return self._ended[name] + sum(counts.get(name, 0) for counts in self._last.values())
