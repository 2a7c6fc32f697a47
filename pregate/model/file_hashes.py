"""Sha256 of files, and the memory of it: a file that was hashed once is not hashed again until it changes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

#: A file changed so shortly before it was hashed may change again without its times showing it; it is hashed anew.
_SETTLED_S = 2.0
_MOST_FILES = 4096


def short_digest(value: Any) -> str:
    """Sixteen hex digits that tell values JSON can hold apart."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def file_sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file, in hex; `advance` is called with the bytes that were read."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
            if advance is not None:
                advance(len(block))
    return digest.hexdigest()


def cache_file() -> Path:
    """Where hashes are kept: below XDG_CACHE_HOME, else ~/.cache. Removing it costs nothing but hashing again."""
    home = os.path.expanduser("~")
    if home == "~":  # a user without one: below a file nothing can be kept
        home = os.devnull
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")) / "pregate" / "sha256.json"


def has_sha256(path: Path, digest: str, advance: Callable[[int], None] | None = None) -> bool:
    """Whether this is a file's sha256; not computed where it was for the same size, times and inode.

    Where the cache cannot be read or written, or says something else, it is computed. `advance` is called with the
    bytes that are done.
    """
    if is_known(path, digest, path.stat()):
        if advance is not None:
            advance(path.stat().st_size)
        return True
    stamp, begun_s = stamp_of(path.stat()), time.time()
    found = file_sha256(path, advance)
    remember(path, stamp, found, begun_s)
    return found == digest


def lock_of(path: Path) -> BinaryIO | None:
    """An open file beside the cache to lock by whoever on this machine hashes the file at `path`; None where nothing
    can be kept."""
    lock = cache_file().parent / "locks" / short_digest([platform.node(), str(path.resolve())])
    with suppress(OSError):
        lock.parent.mkdir(parents=True, exist_ok=True)
        return lock.open("ab")
    return None


def is_known(path: Path, digest: str, found: os.stat_result) -> bool:
    """Whether a file that is open, of which fstat `found` this, is remembered to have this sha256."""
    return _read().get(str(path.resolve())) == [*stamp_of(found), digest]


def remember(path: Path, stamp: list[int], digest: str, begun_s: float) -> None:
    """Remember what a file's sha256 is, whose stamp was this when hashing began at `begun_s`, unless it changed."""
    settled = begun_s - max(stamp[1:3]) / 1e9 > _SETTLED_S
    if settled and stamp_of(path.stat()) == stamp:
        _write(str(path.resolve()), [*stamp, digest])


def stamp_of(found: os.stat_result) -> list[int]:
    """What of a file changes when it does, but for changes within its times' resolution."""
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read() -> dict[str, list]:
    try:
        known = json.loads(cache_file().read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


def _write(key: str, entry: list) -> None:
    """Keep an entry; of two processes that write at once one is forgotten, which costs a hash."""
    known = _read()
    known.pop(key, None)
    known = dict([*known.items()][1 - _MOST_FILES :]) | {key: entry}
    path = cache_file()
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
