"""A checkpoint's reader that is slow, fails now and then, or for good."""

from __future__ import annotations

import threading
import time

import numpy as np

from pregate.base.errors import CheckpointError


class UnsteadyReader:
    """Reads what `reader` reads. Once `begin` was called every read takes up to `delay_s`, every `fails_every`-th fails
    (0: none), and units in `broken` always do."""

    def __init__(self, reader, seed: int = 0, delay_s: float = 0.0, fails_every: int = 0, broken=()) -> None:
        self._reader, self._random = reader, np.random.default_rng(seed)
        self._delay_s, self._fails_every = delay_s, fails_every
        self._begun, self._lock = False, threading.Lock()
        self.broken, self.num_reads, self.num_failed = set(broken), 0, 0

    def __getattr__(self, name: str):
        return getattr(self._reader, name)

    def begin(self) -> None:
        self._begun = True

    def read_unit(self, layer: int, expert: int, out=None):
        if not self._begun:
            return self._reader.read_unit(layer, expert, out)
        with self._lock:
            self.num_reads += 1
            delay_s = self._random.random() * self._delay_s
            fails = (layer, expert) in self.broken or bool(
                self._fails_every and self.num_reads % self._fails_every == 0
            )
            self.num_failed += fails
        time.sleep(delay_s)
        if fails:
            raise CheckpointError("the disk did not answer")
        return self._reader.read_unit(layer, expert, out)
