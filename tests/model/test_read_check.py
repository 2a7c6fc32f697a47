"""Shards are hashed while they are loaded: each byte once, in the order of the file, and a damaged one is refused."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pregate.base.errors import CheckpointError, UserError
from pregate.cluster.clients import in_process
from pregate.cluster.placement import place
from pregate.model import file_hashes, read_check
from pregate.model.checkpoint import CheckpointReader, read_manifest, write_manifest
from pregate.model.file_hashes import is_known
from pregate.model.read_check import Hashes
from pregate.router.engine.build import build_engine
from pregate.router.engine.options import EngineOptions
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import HostOptions

SHARD = "model.safetensors"
UNITS = [(layer, expert) for layer in range(3) for expert in range(5)]


@pytest.fixture(autouse=True)
def forgetful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file was hashed before; none is too young for that to be remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "_SETTLED_S", -1e9)


@pytest.fixture
def copy(tiny_path_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_path_checkpoint, tmp_path / "copy")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """First and last byte of all that was read to be hashed."""
    parts: list[tuple[int, int]] = []
    pread = os.pread

    def noted(fd: int, size: int, start: int) -> bytes:
        parts.append((start, start + size))
        return pread(fd, size, start)

    monkeypatch.setattr(read_check.os, "pread", noted)
    return parts


def flip(path: Path, share: float) -> None:
    """Another bit, so far into the file."""
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def host_of(path: Path, resident: float | None = None) -> ExpertHost:
    reader = CheckpointReader(path, hashes=Hashes.WHILE_READ)
    return ExpertHost(reader, UNITS, HostOptions(resident_experts=resident))


@pytest.mark.parametrize("resident", [None, 0.3])
def test_a_host_hashes_every_byte_once_and_remembers_it(copy: Path, hashed, resident):
    host_of(copy, resident).close()
    size = (copy / SHARD).stat().st_size
    assert hashed[0][0] == 0 and hashed[-1][1] == size
    assert all(after[0] == before[1] for before, after in pairwise(hashed))
    assert len(hashed) > 2, "as it is read, not before"
    hashed.clear()
    assert is_known(copy / SHARD, read_manifest(copy).files[SHARD]["sha256"], (copy / SHARD).stat())
    host_of(copy, resident).close()
    assert hashed == []


def test_units_are_read_in_the_order_of_the_file(tiny_path_checkpoint: Path, copy: Path, monkeypatch):
    """Layers 2, 0, 1 lie there in this order."""
    tensors = load_file(copy / SHARD)
    of_layer = {name: int(name.split(".layers.")[1].split(".")[0]) for name in tensors if ".experts." in name}
    (copy / SHARD).unlink()
    for number, layer in enumerate((2, 0, 1, None)):
        save_file({n: t for n, t in tensors.items() if of_layer.get(n) == layer}, copy / f"model-{number}.safetensors")
    write_manifest(copy, read_manifest(copy))
    read: list[int] = []
    read_unit = CheckpointReader.read_unit
    monkeypatch.setattr(CheckpointReader, "read_unit", lambda s, *unit: (read.append(unit[0]), read_unit(s, *unit))[1])
    host_of(copy).close()
    assert read[-len(UNITS) :] == [2] * 5 + [0] * 5 + [1] * 5


@pytest.mark.parametrize("share", [0.5, 1])
def test_a_damaged_shard_is_refused_by_whoever_would_serve_it(tiny_path_checkpoint: Path, copy: Path, share: float):
    flip(copy / SHARD, share)
    sentence = rf"{copy}/model\.safetensors: damaged"
    with pytest.raises(CheckpointError, match=sentence):
        host_of(copy)
    with pytest.raises(CheckpointError, match=sentence):
        in_process(str(copy), None, UNITS[:2], HostOptions())
    clients = in_process(str(tiny_path_checkpoint), None, UNITS, HostOptions())
    copies_LRC = place([cut.num_routed for cut in CheckpointReader(copy).config.cuts], 1).copies
    with pytest.raises(CheckpointError, match=sentence):
        build_engine(EngineOptions(model=str(copy)), clients, copies_LRC)


@pytest.fixture
def at_it(copy: Path) -> Iterator[CheckpointReader]:
    """A reader that has begun to hash the shard."""
    reader = CheckpointReader(copy, hashes=Hashes.WHILE_READ)
    with reader.checked():
        reader.read_unit(0, 0)
        yield reader


def finish(reader: CheckpointReader) -> None:
    with reader.checked():
        pass


def test_who_finds_another_at_it_waits_for_that_one(at_it: CheckpointReader, copy: Path, hashed):
    other, third = (CheckpointReader(copy, hashes=Hashes.WHILE_READ) for _ in range(2))
    other.read_unit(1, 1)
    assert hashed == [], "a unit is read without"
    waiting = threading.Thread(target=finish, args=(other,))
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive()
    finish(at_it)
    waiting.join(10)
    third.read_unit(0, 1)
    finish(third)
    assert not waiting.is_alive()
    assert sum(stop - start for start, stop in hashed) < (copy / SHARD).stat().st_size, "once, by the first"


def test_where_nothing_can_be_remembered_nobody_waits(copy: Path, hashed, tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    first, second = (CheckpointReader(copy, hashes=Hashes.WHILE_READ) for _ in range(2))
    first.read_unit(0, 0)
    hashed.clear()
    second.read_unit(0, 0)
    assert hashed, "the second hashes as it reads, too"
    finish(second)
    assert sum(stop - start for start, stop in hashed) == (copy / SHARD).stat().st_size
    finish(first)


def test_who_waits_in_vain_hashes_by_itself(at_it: CheckpointReader, copy: Path, hashed, monkeypatch):
    monkeypatch.setattr(read_check, "PATIENCE_S", 0.1)
    finish(CheckpointReader(copy, hashes=Hashes.WHILE_READ))
    assert sum(stop - start for start, stop in hashed) == (copy / SHARD).stat().st_size


def test_what_goes_wrong_by_damage_is_said_to_be_damage(copy: Path):
    flip(copy / SHARD, 1)
    reader = CheckpointReader(copy, hashes=Hashes.WHILE_READ)
    with pytest.raises(CheckpointError, match="damaged"), reader.checked():
        raise ValueError("by what was read")
    with pytest.raises(UserError, match="another reason"), CheckpointReader(copy).checked():
        raise UserError("another reason")


@pytest.mark.parametrize("how", ["in place", "by another"])
def test_a_file_repaired_after_it_was_read_is_refused(copy: Path, tmp_path: Path, how: str):
    """What was read of it was damaged, though what is hashed is not."""
    whole = (copy / SHARD).read_bytes()
    flip(copy / SHARD, 1)
    os.utime(copy / SHARD, ns=(0, 0))  # else both may be written within what a file's times tell apart
    reader = CheckpointReader(copy, hashes=Hashes.WHILE_READ)
    reader.read_unit(0, 0)
    (tmp_path / "new").write_bytes(whole)
    if how == "in place":
        (copy / SHARD).write_bytes(whole)
    else:
        (tmp_path / "new").replace(copy / SHARD)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (damaged|was changed)"):
        finish(reader)


def test_the_file_that_is_open_is_the_one_that_is_known(copy: Path, tmp_path: Path):
    """What replaces it while a reader has it open is not what that reader reads."""
    finish(CheckpointReader(copy, hashes=Hashes.WHILE_READ))
    digest, was = read_manifest(copy).files[SHARD]["sha256"], (copy / SHARD).stat()
    data = (copy / SHARD).read_bytes()
    (tmp_path / "new").write_bytes(data)
    (tmp_path / "new").replace(copy / SHARD)
    assert is_known(copy / SHARD, digest, was)
    assert not is_known(copy / SHARD, digest, (copy / SHARD).stat())
