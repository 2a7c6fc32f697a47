"""The folder of a Ray of our own: made by its keeper, gone with it; its logs stay where something failed.

Each supervisor on that Ray leaves a mark there while it runs, and takes it away only when all went well.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO

#: Set for every process of a kept Ray: its folder.
RUN_DIR_VARIABLE = "PREGATE_RUN_DIR"
#: Ray's sockets lie in the folder and a Unix socket path holds at most 107 bytes; Ray appends about 75.
MAX_FOLDER_BYTES = 30
#: Runs that failed and whose logs are kept; older ones go.
MAX_KEPT_LOGS = 5
_PREFIX = "pregate-"
_MARK = "supervisor-"


def make() -> tuple[Path, IO[str]]:
    """Make a folder, and lock it for as long as this process lives; folders whose keeper was killed go first."""
    sweep_abandoned()
    run_dir = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_short_folder()))
    return run_dir, _lock(run_dir)


def own() -> Path | None:
    """The folder of the kept Ray that this process belongs to; None on a Ray that is not ours."""
    found = os.environ.get(RUN_DIR_VARIABLE)
    return Path(found) if found else None


def mark(name: str) -> None:
    """Say that supervisor `name` runs, until `unmark`."""
    if run_dir := own():
        (run_dir / f"{_MARK}{name.replace('/', '_')}").touch()


def unmark(name: str) -> None:
    """Say that supervisor `name` ended, and that all went well."""
    if run_dir := own():
        (run_dir / f"{_MARK}{name.replace('/', '_')}").unlink(missing_ok=True)


def remove(run_dir: Path) -> Path | None:
    """Remove the folder. Where a mark is left, Ray's logs are kept; returns where."""
    failed = any(run_dir.glob(f"{_MARK}*"))
    kept = _keep_logs(run_dir) if failed else None
    shutil.rmtree(run_dir, ignore_errors=True)
    return kept


def sweep_abandoned() -> None:
    """Remove folders of keepers that were killed before they could do so themselves."""
    for lock_path in Path(_short_folder()).glob(f"{_PREFIX}*/lock"):
        try:
            if lock_path.stat().st_uid != os.getuid():
                continue
            with lock_path.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock_path.parent, ignore_errors=True)
        except (BlockingIOError, FileNotFoundError):
            continue  # in use; or another keeper was quicker


def _keep_logs(run_dir: Path) -> Path | None:
    """Move the logs out of `run_dir` and drop all but the newest few; None when Ray wrote none."""
    logs = next((path for path in run_dir.glob("ray/session_*/logs") if not path.parent.is_symlink()), None)
    if logs is None:
        return None
    folder = Path(_short_folder()) / f"{_PREFIX}logs-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # somebody else's doing, in a folder that all share
        return None
    kept = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    shutil.move(logs, kept)
    for old in sorted(folder.iterdir())[:-MAX_KEPT_LOGS]:
        shutil.rmtree(old, ignore_errors=True)
    return kept


def _short_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= MAX_FOLDER_BYTES else "/tmp"


def _lock(run_dir: Path) -> IO[str]:
    waiting = run_dir / "lock.new"
    file = waiting.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    waiting.rename(run_dir / "lock")  # a lock file without a lock is never to be seen: see sweep_abandoned
    return file
