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
#: So long one process waits for another that hashes a file; then it does so itself, before its own start is given up
#: (`--start-timeout-s`).
PATIENCE_S, _LOOK_S = 240.0, 0.05


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
    """The check of one open file, of which fstat `opened` was found. Whoever reads bytes calls `up_to` with where they
    end, and in the end `finish`.

    What lies before is hashed first, so bytes that are read in their order are hashed a moment before and are in the
    system's cache. Of several processes at one file one hashes it, who holds its lock, and the others wait for it in
    `finish`; where nothing can be remembered (`file_hashes`) all hash. From one thread.
    """

    def __init__(self, path: Path, fd: int, opened: os.stat_result, recorded: Recorded) -> None:
        self._path, self._fd, self._expected, self._refusal = path, fd, recorded.sha256, recorded.refusal
        self._opened, self._begun_s = opened, time.time()
        self._digest, self._done = hashlib.sha256(), 0
        self._lock = lock_of(path)
        self._ours = self._over = self._refused = False

    def up_to(self, stop: int) -> None:
        """Hash the file from where it is hashed already to byte `stop`, unless another process is at it."""
        if self._take():
            self._hash(stop)

    def finish(self) -> None:
        """Return when the whole file is found to be the recorded one; the refusal is raised where it is not."""
        until_s = time.monotonic() + PATIENCE_S
        while not self._take() and not self._over and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
        try:
            if self._over:
                return
            if self._refused:  # nothing came of that wait; all who waited hash at once, not one after the other
                self._release()
            self._hash(self._opened.st_size)
            found = self._digest.hexdigest()
            remember(self._path, stamp_of(self._opened), found, self._begun_s)
            if found != self._expected:
                raise self._refusal
        finally:
            self._release()

    def _take(self) -> bool:
        """Whether it is this process that hashes. Others do not until it is at the end of `finish`, or its own."""
        if self._ours or self._over:
            return self._ours
        try:
            if self._lock is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refused = True
            return False
        except OSError:  # a file system that has no locks
            pass
        self._over = is_known(self._path, self._expected, self._opened)  # another process hashed it meanwhile
        self._ours = not self._over
        if self._over:
            self._release()
        return self._ours

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _hash(self, stop: int) -> None:
        while self._done < stop and (block := os.pread(self._fd, min(_BLOCK_BYTES, stop - self._done), self._done)):
            self._digest.update(block)
            self._done += len(block)
