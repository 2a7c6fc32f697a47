"""A shard that changes under a server: what is held stays as it was, what would be read anew is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pregate.base.errors import CheckpointError
from pregate.model.checkpoint import CheckpointReader
from pregate.model.shard_file import ShardFile


@pytest.fixture
def copy(tiny_path_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_path_checkpoint, tmp_path / "copy")


def write_over(folder: Path) -> None:
    """Zeros in place of every weight, in the same file."""
    with (folder / "model.safetensors").open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start)
        file.write(bytes((folder / "model.safetensors").stat().st_size - start))


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 4096)


@pytest.mark.parametrize("harm", [write_over, cut])
def test_a_unit_is_read_as_it_was_or_not_at_all(harm, copy: Path):
    reader = CheckpointReader(copy)
    gate_up, down = reader.read_unit(0, 0)
    before = gate_up.clone(), down.clone()
    harm(copy)
    assert torch.equal(gate_up, before[0])
    assert torch.equal(down, before[1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed after it was opened"):
        reader.read_unit(0, 1)


def test_a_file_put_in_its_place_changes_nothing(copy: Path):
    """Written beside it and renamed, as tools do that mean well: the open file is still the old one."""
    shard = ShardFile(copy / "model.safetensors")
    name = next(iter(shard.tensors))
    before = shard.read(name)
    (copy / "new").write_bytes(b"x")
    (copy / "new").rename(copy / "model.safetensors")
    assert torch.equal(shard.read(name), before)


SERVED = """
import sys
from pathlib import Path
from pregate.router.link.messages import SamplingParams, SubmitRequest, TokensEvent
from tests.model.test_changed_files import cut, write_over
from tests.router.serving import engine_in_process

def text(engine, name):
    engine.submit(SubmitRequest(name, (1, 5, 6, 7), SamplingParams(12, ignore_eos=True)))
    found = []
    while engine.has_work:
        found += [e.token_ids for e in engine.step() if isinstance(e, TokensEvent)]
    return found

folder = Path(sys.argv[1])
with engine_in_process(folder, 1) as engine:
    before = text(engine, "before")
    for harm in (write_over, cut):
        harm(folder)
        assert len(before) == 12 and text(engine, harm.__name__) == before, harm
"""


def test_an_engine_outlives_the_file_it_came_from(copy: Path):
    """Written over while it serves, and cut: in a process of its own, which a mapped weight would kill (SIGBUS)."""
    subprocess.run([sys.executable, "-c", SERVED, str(copy)], check=True, timeout=120)
