"""`Backoff`: how long to wait before something that failed is tried again."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Backoff:
    """`first_s`, doubled each time up to `most_s`; from the beginning after it ran for `steady_s`.

    `num_free` attempts wait for nothing; after `most` (None: any number) there is none.
    """

    first_s: float
    most_s: float
    steady_s: float = 60.0
    num_free: int = 0
    most: int | None = None
    attempts: int = 0
    _runs_since_s: float | None = None

    def runs(self, now_s: float) -> None:
        """It runs from now on."""
        self._runs_since_s = now_s

    def failed(self, now_s: float) -> float:
        """It ran no longer, or did not come up: return the seconds to wait before it is tried again, inf for never."""
        if self._runs_since_s is not None and now_s - self._runs_since_s >= self.steady_s:
            self.attempts = 0
        self._runs_since_s = None
        if self.most is not None and self.attempts >= self.most:
            return math.inf
        self.attempts += 1
        doublings = self.attempts - self.num_free - 1
        return 0.0 if doublings < 0 else min(self.first_s * 2.0 ** min(doublings, 64), self.most_s)
