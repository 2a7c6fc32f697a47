"""Memory cgroups of either version: found, limited, and gone with all that ran in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory_cgroup import Controller, MemoryCgroup, controller
from pregate.base.errors import UnavailableError

LIMIT_BYTES = 64 << 20


def test_version_2_is_preferred_where_it_has_the_controller_and_version_1_taken_else(tmp_path: Path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "unified").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("0")
    (tmp_path / "unified" / "cgroup.controllers").write_text("hugetlb\n")
    found = controller(tmp_path)
    assert (found.folder, found.limit) == (tmp_path / "memory", "memory.limit_in_bytes")
    (tmp_path / "unified" / "cgroup.controllers").write_text("cpu memory\n")
    found = controller(tmp_path)
    assert (found.folder, found.limit) == (tmp_path / "unified", "memory.max")
    assert (tmp_path / "unified" / "cgroup.subtree_control").read_text() == "+memory"


def test_where_memory_cannot_be_limited_it_is_said(tmp_path: Path):
    with pytest.raises(UnavailableError, match=f"no memory controller below {tmp_path}"):
        controller(tmp_path)
    with pytest.raises(UnavailableError, match="no group can be made here"):
        MemoryCgroup(LIMIT_BYTES, Controller(tmp_path / "none", "limit", ("swap", ""), "peak", "events", "own"))


@pytest.fixture
def group() -> MemoryCgroup:
    try:
        return MemoryCgroup(LIMIT_BYTES)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("num_mb", "fits"), [(16, True), (200, False)])
def test_a_process_gets_so_much_and_no_more(group: MemoryCgroup, num_mb: int, fits: bool):
    code = f"held = bytearray({num_mb} << 20); print('held', flush=True); input()"
    with group:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            preexec_fn=group.enter,  # noqa: PLW1509 - no thread of ours runs beside
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == ("held\n" if fits else "")
        assert group.killed == (not fits)
        if fits:
            found = group.memory()
            assert found["limit_bytes"] == LIMIT_BYTES
            assert num_mb << 20 < found["own_bytes"] <= found["peak_bytes"] <= LIMIT_BYTES
    assert process.wait(timeout=10) == -9, "what was left was killed"
    assert not group.folder.exists()
