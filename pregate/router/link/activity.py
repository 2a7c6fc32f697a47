"""What a compute thread is busy with, for whoever asks while it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Activity:
    """What the compute thread is busy with, since when, and how much it has done. It writes, the I/O thread reads."""

    def __init__(self) -> None:
        self.progress = 0
        self._doing: tuple[str, float] | None = None

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Be busy with `what` inside the block."""
        self._doing = (what, time.monotonic())
        try:
            yield
        finally:
            self._doing = None
            self.progress += 1

    def describe(self) -> dict[str, Any]:
        """Return `progress`, `busy_with` (None: idle) and `busy_s`."""
        now_s = time.monotonic()
        what, since_s = self._doing or (None, now_s)
        return {"progress": self.progress, "busy_with": what, "busy_s": now_s - since_s}
