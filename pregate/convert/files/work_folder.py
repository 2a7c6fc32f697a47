"""A hidden folder beside `--out` where long work keeps what it needs to go on: its lock, and files written whole; and
parts of the fingerprint that says what the work is of."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError

from pregate.base.errors import PregateError, UserError


def short_digest(value: Any) -> str:
    """Sixteen hex digits that tell values JSON can hold apart."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def run_by(device: torch.device) -> dict[str, str]:
    """What work is done by, as fields of its fingerprint: another of these may give other last bits."""
    return {name: version(name) for name in ("pregate", "torch", "transformers")} | {"device": device.type}


@contextmanager
def _locked(out: Path, folder: Path, what: str) -> Iterator[None]:
    """Make `folder` where it is not, and hold its lock within the block.

    UserError names `what` (a conversion) when another process holds it, or has finished `out` meanwhile.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError.of("--out", out, f"cannot be written ({error})") from error
    with (folder / "lock").open("ab") as lock:
        if not _lock(lock) or out.exists():
            raise UserError.of("--out", out, f"another {what} is writing it (in {folder})")
        yield


@contextmanager
def opened(
    out: Path,
    folder: Path,
    what: str,
    restart: bool,
    fingerprint: dict[str, Any],
    read: Callable[[], dict[str, Any] | None],
) -> Iterator[None]:
    """Go on with the unfinished `what` in `folder`, or begin one in it, empty; the block holds its lock.

    `read` gives the fingerprint of what lies there, None where nothing does. UserError when another process works on
    it, and when that fingerprint is another one than `fingerprint` (unless `restart`, which discards what there is).
    """
    with _locked(out, folder, what):
        if restart:
            _empty(folder)
        there = read()
        if there is None:
            _empty(folder)
        elif there != fingerprint:
            raise UserError.of("--out", out, _differences(folder, what, there, fingerprint))
        yield


def _lock(lock: BinaryIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # One that ended between our opening and locking has removed the file: then the lock is of nothing.
    return os.fstat(lock.fileno()).st_nlink > 0


def _empty(folder: Path) -> None:
    """Remove everything in `folder` but its lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file under another name, then sync and rename it: a file of this name is always whole, and
    after a loss of power still there.

    OSError or SafetensorError when it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put on the disk which names the folder holds: what was renamed is then of its new name for good."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


#: What `write_whole` raises where the disk is full or the folder gone.
WRITE_ERRORS = (OSError, SafetensorError)


@contextmanager
def writing(out: Path, what: Path) -> Iterator[None]:
    """PregateError where `what`, a file of the work on `out`, cannot be written in the block: the work is kept."""
    try:
        yield
    except WRITE_ERRORS as error:
        reason = f"{what} cannot be written ({error}); what is done is kept, the same command goes on"
        raise PregateError(f"--out {out}: {reason}") from error


def interrupted_after(unit: str, done: int | None, total: int | None = None) -> str:
    """What an interrupted run leaves that had `done` so many of a `unit` (None: too few to keep), and how to go on."""
    if done is None:
        return "interrupted; nothing was kept"
    of = "" if total is None else f" of {total}"
    return f"interrupted after {unit} {done}{of}; the same command goes on there, with --restart it begins anew"


def _differences(folder: Path, what: str, there: dict[str, Any], here: dict[str, Any]) -> str:
    """The sentence that says how the unfinished work in `folder` differs from what is asked for now."""
    names = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
    changed = ", ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in names)
    return (
        f"{folder} holds an unfinished {what} that differs ({changed}); give what was given there to go on with it,"
        " or --restart to discard it"
    )
