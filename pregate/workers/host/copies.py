"""`Copies`: units are copied to a CUDA device on a stream of their own, beside what computes. On a CPU: nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

#: Copies that may be on their way at a time: enough that the next begins as one ends.
IN_FLIGHT = 8


class Copies:
    """Orders copies into slots after the last use of what lay there. Each slot has an event that says when its copy has
    ended; whoever is about to use the slot waits for that, and nobody else waits for a copy.

    Slots have names of any kind, for all pools of a host. One thread uses slots, others may copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last_use: torch.cuda.Event | None = None
        self._arriving: dict[object, torch.cuda.Event] = {}
        self._lock = threading.Lock()

    def used(self) -> None:
        """All that was launched so far on the current stream may read slots that are free from now on."""
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record()
            self._last_use = event

    @contextmanager
    def copying(self, slot: object) -> Iterator[None]:
        """Run copies into a slot: they begin after the last use. Waits while too many are on their way."""
        if self._stream is None:
            yield
            return
        self._make_way()
        with torch.cuda.stream(self._stream):
            if self._last_use is not None:
                self._stream.wait_event(self._last_use)
            yield
            event = torch.cuda.Event()
            event.record(self._stream)
        with self._lock:
            self._arriving.pop(slot, None)  # a copy before this one, of a unit that left: this one comes after it
            self._arriving[slot] = event

    def wait_for(self, slots: Iterable[object]) -> float:
        """Return when copies into these slots have ended, and the seconds that took."""
        if not self._arriving:
            return 0.0
        with self._lock:
            events = [self._arriving.pop(slot) for slot in slots if slot in self._arriving]
        begun_s = time.perf_counter()
        coming = [event for event in events if not event.query()]
        for event in coming:
            event.synchronize()
        return time.perf_counter() - begun_s if coming else 0.0

    def _make_way(self) -> None:
        with self._lock:
            for slot in [slot for slot, event in self._arriving.items() if event.query()]:
                del self._arriving[slot]
            oldest = next(iter(self._arriving.values()), None) if len(self._arriving) >= IN_FLIGHT else None
        if oldest is not None:
            oldest.synchronize()
