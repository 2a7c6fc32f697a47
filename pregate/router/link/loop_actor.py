"""What the shells of the engine and of the path service share: a server's loop in a thread, in a process of its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from threading import Event as StopEvent
from typing import Any, Protocol, TypeAlias

from pregate.base.telemetry import flush
from pregate.router.link.endpoint import starting_file

_POLL_S = 0.05


class Server(Protocol):
    """What is run: until its event is set, with everything that waits ended."""

    @property
    def has_work(self) -> bool: ...
    def status(self) -> dict[str, Any]: ...
    def describe(self) -> dict[str, Any]: ...
    def run(self, stop_event: StopEvent) -> None: ...


#: Given a function that says what a server's numbers are, from when it serves.
Export: TypeAlias = Callable[[Callable[[], Mapping[str, Any]]], None]


class LoopActor:
    """Runs a server's loop in a thread. `stop_timeout_s`: how long it may take to notice that it is to stop."""

    stop_timeout_s = 10.0

    def __init__(self, endpoint: str, export: Export | None = None) -> None:
        self._endpoint, self._export = endpoint, export
        self._starting = starting_file(endpoint)
        if self._starting is not None:  # front doors that miss the one before can say so
            self._starting.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._starting.touch()
        self._stop_event = threading.Event()
        self._server: Server | None = None
        self._thread: threading.Thread | None = None

    def serve(self, server: Server, name: str) -> None:
        """Start the loop, in a thread of this name."""
        self._server = server
        if self._starting is not None:
            self._starting.unlink(missing_ok=True)
        self._thread = threading.Thread(target=server.run, args=(self._stop_event,), name=name, daemon=True)
        self._thread.start()
        if self._export is not None:
            self._export(lambda: self._numbers(server))

    def _numbers(self, server: Server) -> Mapping[str, Any]:
        """What is exported of what a server says of itself."""
        return server.describe()

    def status(self) -> dict[str, Any]:
        """`running` turns false when the loop has ended, by `stop` or by a bug (the log has it).

        `unavailable` says why requests are refused meanwhile (a lost host, for one), None when they are taken;
        `busy_with` and `busy_s` what is being computed, None when nothing is.
        """
        running = self._thread is not None and self._thread.is_alive()
        return {"pid": os.getpid(), "running": running, **(self._server.status() if self._server else {})}

    def drain(self, timeout_s: float) -> bool:
        """Wait until no request is left; False when `timeout_s` passes first."""
        give_up_s = time.monotonic() + timeout_s
        while self._server is not None and self.status()["running"] and self._server.has_work:
            if time.monotonic() > give_up_s:
                return False
            time.sleep(_POLL_S)
        return True

    def stop(self) -> None:
        """End the loop (requests left fail with UNAVAILABLE). Repeating it is harmless."""
        self._stop_event.set()
        if self._thread is not None:
            self._thread.join(self.stop_timeout_s)
        flush()
