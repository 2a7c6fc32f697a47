"""`EngineHealth`: whether an engine is there, as one that sends it keep-alives can tell."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from pregate.router.link.endpoint import starting_file
from pregate.router.link.messages import Heartbeat


@dataclass(frozen=True)
class EngineClientOptions:
    """Times in seconds. The engine's I/O thread answers while a step runs. Silence for `silence_s` without a connection
    means that its process is lost; a connected one is there and gets no time (it is stopped, or the machine swaps), and
    is waited for up to `frozen_s`. Who connects in one process (`inproc`) never counts as connected.
    `max_unsent_bytes` of requests wait here while it reads nothing: as many as may wait in an engine."""

    keep_alive_s: float = 0.5
    silence_s: float = 2.5
    frozen_s: float = 60.0
    reply_timeout_s: float = 10.0
    max_unsent_bytes: int = 1 << 30


class EngineHealth:
    """`name` is what the engine is called. Keep-alives that it left unanswered are counted: a clock would keep a frozen
    front door blaming the engine when it wakes."""

    def __init__(self, endpoint: str, name: str, options: EngineClientOptions) -> None:
        self._endpoint, self._name, self._options = endpoint, name, options
        self._heartbeat: Heartbeat | None = None
        self._silent_ticks = 0
        #: Whether it, or its loss, was ever heard of.
        self.answered = False
        #: Why its process cannot be reached, or None.
        self.lost: str | None = None
        #: Whether somebody holds the other end of the connection.
        self.connected = False

    @property
    def unavailable(self) -> str | None:
        """Why the engine takes no work now, or None."""
        if not self.answered:
            return f"{self._name} has not answered yet"
        return self.lost or (self._heartbeat.unavailable if self._heartbeat else None)

    def heard(self) -> None:
        """Something came."""
        self._silent_ticks = 0

    def understood(self) -> None:
        """What came was its."""
        self.answered, self.lost = True, None

    def beat(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat

    def lose(self, reason: str) -> None:
        self.answered, self.lost = True, reason

    def tick(self) -> bool:
        """A keep-alive was sent, and its time has passed; True while there was silence for too long."""
        self._silent_ticks += 1
        silent_s = self._silent_ticks * self._options.keep_alive_s
        if silent_s <= (self._options.frozen_s if self.connected else self._options.silence_s):
            return False
        self.lose(self._why_silent(silent_s))
        return True

    def _why_silent(self, silent_s: float) -> str:
        file = starting_file(self._endpoint)
        with contextlib.suppress(OSError):  # there is none, or not any more
            since_s = time.time() - file.stat().st_mtime if file is not None else -1
            if since_s >= 0:
                return f"{self._name} starts again, for {since_s:.0f} s already"
        return f"{self._name} has been silent for {silent_s:.0f} s"
