"""`Copies`: units are copied to a CUDA device on a stream of their own, beside what computes. On a CPU: nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Copies:
    """Orders copies into slots after the last use of what lay there, and waits for each copy where it is made."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last_use: torch.cuda.Event | None = None

    def used(self) -> None:
        """All that was launched so far on the current stream may read slots that are free from now on."""
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record()
            self._last_use = event

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Run copies into slots: they begin after the last use, and have ended when the block has."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if self._last_use is not None:
                self._stream.wait_event(self._last_use)
            yield
        self._stream.synchronize()
