"""What a supervisor knows, kept beside its sockets: the process that takes its place when it dies goes on from it."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pregate.base.errors import UnavailableError
from pregate.base.log import get_logger
from pregate.cluster import run_folder

logger = get_logger(__name__)


class Record:
    """A folder of the user's alone (mode 700: keys are in it), for sockets too. `key` is the actor's, and so the next
    process finds the folder: it runs on the same node."""

    def __init__(self, key: str) -> None:
        self.folder = (run_folder.own() or Path(tempfile.gettempdir())) / f"pregate-ipc-{key}"
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise UnavailableError(f"{self.folder}: belongs to another user")
        self._path, self._written = self.folder / "record", b""

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None before anything was."""
        return pickle.loads(self._path.read_bytes()) if self._path.exists() else None

    def save(self, values: dict[str, Any]) -> None:
        """Save values, also handles of detached actors; all or none is there. A full disk ends nothing."""
        written = pickle.dumps(values)
        if written != self._written:
            new = self._path.with_suffix(".new")
            try:
                new.write_bytes(written)
                new.replace(self._path)
            except OSError as error:
                logger.error("should this process die, the next will not know what has changed: %s", error)
            self._written = written

    def remove(self) -> None:
        """Remove the folder: all that was of use is over."""
        shutil.rmtree(self.folder, ignore_errors=True)
