"""`Tally`: what processes counted that may start anew, so that no sum of theirs falls."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping


class Tally:
    """Sums of counts by name, over processes. A process that starts anew counts from zero: what the one before had
    counted is kept."""

    def __init__(self) -> None:
        self._ended: Counter[Hashable] = Counter()
        self._last: defaultdict[Hashable, Counter[Hashable]] = defaultdict(Counter)

    def take(self, process: Hashable, counts: Mapping[Hashable, float]) -> None:
        """Take note of what a process counted so far."""
        last = self._last[process]
        for name, value in counts.items():
            if value < last[name]:
                self._ended[name] += last[name]
            last[name] = value

    def __getitem__(self, name: Hashable) -> float:
        return self._ended[name] + sum(counts[name] for counts in self._last.values())
