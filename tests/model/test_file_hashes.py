"""A file is hashed once, and again when it changes; without a place to remember it, every time."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from pregate.model import file_hashes
from pregate.model.file_hashes import has_sha256


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read, with a cache of the test's own, and no file too young to be remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "_SETTLED_S", -1e9)
    read: list[Path] = []
    real = file_hashes.file_sha256
    monkeypatch.setattr(file_hashes, "file_sha256", lambda path, advance: (read.append(path), real(path, advance))[1])
    return read


def test_a_file_is_hashed_once_until_it_changes(hashed: list[Path], tmp_path: Path):
    path = tmp_path / "shard"
    path.write_bytes(b"one")
    one, two = (hashlib.sha256(data).hexdigest() for data in (b"one", b"two"))
    num_bytes: list[int] = []
    assert has_sha256(path, one, num_bytes.append) and has_sha256(path, one, num_bytes.append)
    assert (hashed, num_bytes) == ([path], [3, 3])
    path.write_bytes(b"two")
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    assert has_sha256(path, two) and not has_sha256(path, one)
    assert hashed[:2] == [path, path]


@pytest.mark.parametrize("entry", ["another", None, 7])
def test_a_damaged_entry_of_the_cache_condemns_no_file(hashed: list[Path], tmp_path: Path, entry: Any):
    path = tmp_path / "shard"
    path.write_bytes(b"one")
    digest = hashlib.sha256(b"one").hexdigest()
    assert has_sha256(path, digest)
    cache = file_hashes.cache_file()
    ((key, known),) = json.loads(cache.read_text()).items()
    cache.write_text(json.dumps({key: [*known[:-1], entry]}))
    for _ in range(2):
        assert has_sha256(path, digest)
    assert len(hashed) == 2  # and it is mended


@pytest.mark.parametrize("why", ["a file is in the way", "the user has no home"])
def test_where_nothing_can_be_kept_it_is_hashed_every_time(hashed: list[Path], tmp_path: Path, monkeypatch, why: str):
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    if why == "the user has no home":
        for name in ("XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name)
        monkeypatch.setattr(os, "getuid", lambda: 54321)
        monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert has_sha256(tmp_path / "file", hashlib.sha256(b"in the way of a folder").hexdigest())
    assert len(hashed) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_changed_just_before_a_long_hashing_is_not_remembered(hashed: list[Path], tmp_path: Path, monkeypatch):
    # It may have changed again meanwhile, where its times are coarse.
    monkeypatch.setattr(file_hashes, "_SETTLED_S", 0.2)
    monkeypatch.setattr(file_hashes, "file_sha256", lambda path, _: (time.sleep(0.3), hashed.append(path), "digest")[2])
    (tmp_path / "shard").write_bytes(b"one")
    for _ in range(2):
        has_sha256(tmp_path / "shard", "digest")
    assert len(hashed) == 2


def test_a_file_changed_just_now_is_not_remembered(hashed: list[Path], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(file_hashes, "_SETTLED_S", 60.0)
    (tmp_path / "shard").write_bytes(b"one")
    for _ in range(2):
        assert has_sha256(tmp_path / "shard", hashlib.sha256(b"one").hexdigest())
    assert len(hashed) == 2
