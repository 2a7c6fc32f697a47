"""`MemoryCgroup`: processes that get so much memory and no more, what the system caches of files for them included."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pregate.base.errors import UnavailableError

ROOT = Path("/sys/fs/cgroup")
#: Longest wait for killed processes to be gone.
_GONE_S = 10.0


@dataclass(frozen=True)
class Controller:
    """A memory controller: where its groups are made, and the names of its files; `own` is the line of memory.stat with
    the bytes that are in no file. `swap` may be missing, as where there is no swap."""

    folder: Path
    limit: str
    swap: tuple[str, str]
    peak: str
    events: str
    own: str


def controller(root: Path = ROOT) -> Controller:
    """The memory controller of cgroups v2 where there is one, else of v1. UnavailableError where there is neither."""
    for folder in (root, root / "unified"):
        listed = folder / "cgroup.controllers"
        if listed.is_file() and "memory" in listed.read_text().split():
            with contextlib.suppress(OSError):  # it may be on already; if it is not, the limit cannot be written
                (folder / "cgroup.subtree_control").write_text("+memory")
            return Controller(folder, "memory.max", ("memory.swap.max", "0"), "memory.peak", "memory.events", "anon")
    folder = root / "memory"
    if (folder / "memory.limit_in_bytes").is_file():
        swap = ("memory.memsw.limit_in_bytes", "")
        peak = "memory.max_usage_in_bytes"
        return Controller(folder, "memory.limit_in_bytes", swap, peak, "memory.oom_control", "total_rss")
    raise UnavailableError(f"no memory controller below {root}, of cgroups v2 or v1: memory cannot be limited here")


class MemoryCgroup:
    """A group of processes held to `limit_bytes`, without swap. Those that are left when the block ends are killed.

    UnavailableError where this user cannot make one.
    """

    def __init__(self, limit_bytes: int, of: Controller | None = None) -> None:
        self._of = of or controller()
        self.folder = self._of.folder / f"pregate-{uuid.uuid4().hex[:8]}"
        try:
            self.folder.mkdir()
            (self.folder / self._of.limit).write_text(str(limit_bytes))
            name, value = self._of.swap
            if (self.folder / name).is_file():
                (self.folder / name).write_text(value or str(limit_bytes))
        except OSError as error:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            raise UnavailableError(f"{self.folder}: no group can be made here ({error.strerror}); be root") from error

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        until_s = time.monotonic() + _GONE_S
        while (left := self._processes()) and time.monotonic() < until_s:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)
        self.folder.rmdir()

    def enter(self) -> None:
        """Move the calling process in, and so all that it will start."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def read_bytes(self) -> int:
        """Bytes that the processes in it have had read from disks, by themselves or ahead, since they began."""
        total = 0
        for process in self._processes():
            with contextlib.suppress(OSError):
                total += _number(Path(f"/proc/{process}/io"), "read_bytes:")
        return total

    def memory(self) -> dict[str, Any]:
        """Bytes: the limit, the most so far (None where the system does not say), and now what is in no file."""
        peak = self.folder / self._of.peak
        return {
            "limit_bytes": int((self.folder / self._of.limit).read_text()),
            "peak_bytes": int(peak.read_text()) if peak.is_file() else None,
            "own_bytes": _number(self.folder / "memory.stat", self._of.own),
        }

    @property
    def killed(self) -> bool:
        """Whether the system ended a process for lack of memory."""
        return _number(self.folder / self._of.events, "oom_kill") > 0

    def _processes(self) -> list[int]:
        return [int(line) for line in (self.folder / "cgroup.procs").read_text().split()]


def _number(file: Path, name: str) -> int:
    """The number in the line of `file` that begins with `name`."""
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[0] == name)
