"""A node's end of `pregate push`: files come piece by piece, each under another name until its hash fits.

.<name>.partial   what has come so far; held (flock) by the one process that writes it
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from pregate.base.errors import PregateError
from pregate.base.folders import sync_folder
from pregate.cluster.finding import gigabytes
from pregate.model.file_hashes import file_sha256, has_sha256


@dataclass(frozen=True)
class PushedFile:
    """A file as it lies at `source`. It goes to `target` on every node, where `~` is that node's home."""

    source: str
    target: str
    sha256: str
    num_bytes: int

    @property
    def path(self) -> Path:
        """Its target on this node."""
        return Path(self.target).expanduser()

    def is_here(self) -> bool:
        """Whether the node has it. PregateError where another file is in its place."""
        path = self.path
        if not path.exists():
            return False
        if path.is_file() and path.stat().st_size == self.num_bytes and has_sha256(path, self.sha256):
            return True
        raise PregateError(f"{path} is there and is another file; move it away, or name another folder with --to")


class Receiver:
    """Writes what comes to one node, one file after another; an actor that is called in order."""

    def __init__(self) -> None:
        self._partial: FileIO | None = None  # None: nothing is taken in

    def lacking(self, files: Sequence[PushedFile]) -> list[str]:
        """Targets of what is not here yet. PregateError where another file is in a place, or the disk has no room."""
        missing = [file for file in files if not file.is_here()]
        needed: dict[int, tuple[Path, int]] = {}  # of each disk
        for file in missing:
            folder = next(parent for parent in file.path.parents if parent.exists())
            disk = folder.stat().st_dev
            needed[disk] = folder, file.num_bytes + needed.get(disk, (folder, 0))[1]
        for folder, num_bytes in needed.values():
            if (free := shutil.disk_usage(folder).free) < num_bytes:
                raise PregateError(f"{folder} has no room: {gigabytes(num_bytes)} needed, {gigabytes(free)} free")
        return [file.target for file in missing]

    def begin(self, file: PushedFile) -> None:
        """Take in this file; nothing of it where another process writes it, as on a disk that nodes share."""
        path = file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.with_name(f".{path.name}.partial")
        partial = FileIO(name, "ab")
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if name.stat().st_ino == os.fstat(partial.fileno()).st_ino:  # else it has got its name meanwhile
                partial.truncate(0)
                self._partial = partial
                return
        partial.close()

    def write(self, piece: memoryview) -> None:
        """Take in the next piece, an array of bytes."""
        if self._partial is None:
            return
        left = memoryview(piece)
        try:
            while left:
                left = left[self._partial.write(left) :]
        except OSError:
            self._discard(self._partial)
            raise

    def end(self, file: PushedFile) -> bool:
        """Give the file its name; False where nothing was taken in. PregateError for another hash than it should have,
        and where another file has come to be in its place."""
        partial = self._partial
        if partial is None:
            return False
        try:
            os.fsync(partial.fileno())
            if file_sha256(Path(partial.name)) != file.sha256:
                raise PregateError(f"{file.path}: what came is not what was sent; was {file.source} changed meanwhile?")
            if not file.is_here():
                Path(partial.name).replace(file.path)
        finally:
            self._discard(partial)
        sync_folder(file.path.parent)
        return True

    def _discard(self, partial: FileIO) -> None:
        """Remove what has not got its name, then let go of it: whoever takes it next finds it gone."""
        Path(partial.name).unlink(missing_ok=True)
        partial.close()
        self._partial = None
