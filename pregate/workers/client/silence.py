"""How long a peer has said nothing."""

from __future__ import annotations

import time


class Silence:
    """Seconds without a word of a peer, in which somebody looked. Time in which nobody did (a long forward pass, a
    stopped machine) counts little: `most_s` at a time.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self.seconds = 0.0
        self.looked_s = time.monotonic()

    def end(self) -> None:
        """Something was heard."""
        self.looked_s, self.seconds = time.monotonic(), 0.0

    def count(self) -> float:
        """Nothing was heard now either; returns the seconds in all."""
        now_s = time.monotonic()
        self.seconds += min(now_s - self.looked_s, self._most_s)
        self.looked_s = now_s
        return self.seconds
