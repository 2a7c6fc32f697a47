"""A `pregate serve` of one's own: what its start goes to, what its processes hold, what its screen says and when."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import psutil

from tests.cluster.leftovers import Running, command_of, launched, processes_of, wait_for

#: How often the launcher's screen is read.
_READ_EVERY_S = 0.02
PATIENCE_S = 120.0
_ROLES = {
    "pregate.cli.main serve": "launcher",
    "cluster.local_ray": "keeper",
    "Supervisor": "supervisor",
    "EngineActor": "engine",
    "PathActor": "path service",
    "DoorActor": "front door",
    "ExpertHostActor": "expert hosts",
}


class Deployment:
    """One that serves. `stages` tells when each stage of its start began, `start_s` when all were over (seconds)."""

    def __init__(self, running: Running, started_s: float) -> None:
        self._running, self._started_s = running, started_s
        self._ended = threading.Event()
        self.screen: list[tuple[float, str]] = []  # monotonic seconds, line
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_for(running.log, "stop  ", running.process)
        self.start_s = time.monotonic() - started_s
        self.process, self.target = running.process, running.target
        starting = takewhile(lambda said: not said[1].startswith("serving"), list(self.screen))
        no_stage = ("(after", " log to ")
        stages = [
            (t, line.strip()) for t, line in starting if line.startswith("  ") and not any(map(line.count, no_stage))
        ]
        self.stages = {line: round(t - started_s, 1) for t, line in stages}

    def _read(self) -> None:
        with self._running.log.open() as log:
            rest = ""
            while not self._ended.wait(_READ_EVERY_S):
                *lines, rest = (rest + log.read()).split("\n")
                self.screen += [(time.monotonic(), line) for line in lines]

    def parts(self, role: str) -> list[psutil.Process]:
        """Its processes of a role."""
        return [process for process in processes_of(self._running.folder) if _role(process) == role]

    def held_bytes(self) -> dict[str, int]:
        """Proportional share of memory (PSS) by role; what Ray runs of its own is one of them."""
        found: dict[str, int] = {}
        for process in processes_of(self._running.folder):
            with contextlib.suppress(psutil.Error):
                role = _role(process)
                found[role] = found.get(role, 0) + process.memory_full_info().pss
        return found

    def said(self, *words: str, timeout_s: float = PATIENCE_S) -> tuple[float, str]:
        """Wait for a line of the screen with one of these words; returns when it came and the line."""
        give_up_s = time.monotonic() + timeout_s
        while time.monotonic() < give_up_s:
            for said_s, line in list(self.screen):
                if any(word in line for word in words):
                    return said_s, line
            time.sleep(_READ_EVERY_S)
        raise TimeoutError(f"the screen does not say {words} within {timeout_s:.0f} s: {self.screen[-5:]}")

    def stop(self) -> list[str]:
        """Ask the launcher to end, unless it has; returns what is left of processes and files then."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.process.wait(PATIENCE_S)
        for logs in self._running.folder.glob("pregate-logs-*"):  # kept for a failure, which was of our making
            shutil.rmtree(logs)
        return self._running.wait_nothing_left(10)

    def close(self) -> None:
        self._ended.set()
        self._reader.join()


@contextmanager
def deployed(model: Path, *arguments: object) -> Iterator[Deployment]:
    """`pregate serve --model` with these arguments, on a free port and a Ray of its own, until the block ends."""
    started_s = time.monotonic()
    command = ("-m", "pregate.cli.main", "serve", "--grpc-port", 0, "--model", model, *arguments)
    with launched(*command) as running:
        deployment = Deployment(running, started_s)
        try:
            yield deployment
            if deployment.process.poll() is None:
                deployment.stop()
        finally:
            deployment.close()


def _role(process: psutil.Process) -> str:
    command = command_of(process)
    return next((role for part, role in _ROLES.items() if part in command), "Ray")
