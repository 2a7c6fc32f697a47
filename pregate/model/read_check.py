"""`ReadCheck`: the sha256 of a file is compared with the recorded one while the file is read, from the disk once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pregate.base.errors import UserError
from pregate.model.file_hashes import is_known, lock_of, remember, stamp_of

_SHARD = ".safetensors"
_BLOCK_BYTES = 1 << 22
#: So long one process waits for another that hashes a file, minutes for a large one on a slow disk; then it does so
#: itself. Who starts it has a limit of its own.
PATIENCE_S, _LOOK_S = 1800.0, 0.05


class Hashes(Enum):
    """Which files' sha256 is looked at: none, all before anything is read, or the shards' while they are read."""

    NONE = "none"
    FIRST = "first"
    WHILE_READ = "while read"

    def at_once(self, name: str) -> bool:
        """Whether a file of a checkpoint is to be hashed before it is read."""
        return self is Hashes.FIRST or (self is Hashes.WHILE_READ and not name.endswith(_SHARD))


@dataclass(frozen=True)
class Recorded:
    """What a file's sha256 was when it was recorded, and what is said of one that has another."""

    sha256: str
    refusal: UserError


class ReadCheck:
    """The check of one open file. Whoever reads bytes calls `up_to` with where they end, and in the end `finish`.

    What lies before is hashed first, so bytes that are read in their order are hashed a moment before and are in the
    system's cache. Of several processes at one file one hashes it, who holds its lock, and the others wait for it in
    `finish`; where nothing can be remembered (`file_hashes`) all hash. From one thread.
    """

    def __init__(self, path: Path, fd: int, recorded: Recorded) -> None:
        self._path, self._fd, self._expected, self._refusal = path, fd, recorded.sha256, recorded.refusal
        self._digest, self._done, self._begun_s = hashlib.sha256(), 0, 0.0
        self._taken, self._lock = False, lock_of(path)

    def up_to(self, stop: int) -> None:
        """Hash the file from where it is hashed already to byte `stop`, unless another process is at it."""
        if self._take():
            self._hash(stop)

    def finish(self) -> None:
        """Return when the whole file is found to be the recorded one; the refusal is raised where it is not."""
        until_s = time.monotonic() + PATIENCE_S
        while not self._take() and not self._known() and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
        try:
            if not self._done and self._known():
                return  # another process hashed it meanwhile
            self._hash(os.fstat(self._fd).st_size)
            found = self._digest.hexdigest()
            remember(self._path, stamp_of(os.fstat(self._fd)), found, self._begun_s)
            if found != self._expected:
                raise self._refusal
        finally:
            if self._lock is not None:
                self._lock.close()  # which gives the lock back

    def _known(self) -> bool:
        return is_known(self._path, self._expected, os.fstat(self._fd))

    def _take(self) -> bool:
        """Whether it is this process that hashes. Others do not until it is at the end of `finish`, or its own."""
        if not self._taken:
            try:
                if self._lock is not None:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:  # a file system that has no locks
                pass
            self._taken, self._begun_s = True, time.time()
        return True

    def _hash(self, stop: int) -> None:
        while self._done < stop and (block := os.pread(self._fd, min(_BLOCK_BYTES, stop - self._done), self._done)):
            self._digest.update(block)
            self._done += len(block)
