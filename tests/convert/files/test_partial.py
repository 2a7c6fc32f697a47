"""The last moments of long work: what is on the disk for good, and what a kill leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pregate.convert.files.partial import open_partial, partial_folder
from pregate.convert.files.work_folder import write_whole


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What was synced, in order, and for a folder the names it held then."""
    found: list[tuple[str, list[str]]] = []
    fsync = os.fsync

    def record(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        found.append((path, sorted(os.listdir(path)) if os.path.isdir(path) else []))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    return found


def test_a_file_is_there_for_good_under_its_own_name(tmp_path: Path, synced: list[tuple[str, list[str]]]):
    write_whole(tmp_path / "state.json", lambda path: path.write_text("{}"))
    assert synced == [(str(tmp_path / "state.json.tmp"), []), (str(tmp_path), ["state.json"])]


def test_a_finished_checkpoint_is_there_for_good_before_the_rest_goes(
    tmp_path: Path, synced: list[tuple[str, list[str]]]
):
    with open_partial(tmp_path / "out", {}, 1, restart=False) as partial:
        partial.layer_done({"x": torch.zeros(1)}, {})
        partial.finish()
    assert synced[-1] == (str(tmp_path), [".out.partial", "out"])
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_kill_leaves_of_finished_work_goes_with_the_next(tmp_path: Path):
    """Killed after the checkpoint got its name. What is unfinished, or at work, stays."""
    with open_partial(tmp_path / "undone", {}, 2, restart=False) as partial:
        partial.layer_done({"x": torch.zeros(1)}, {})
    with open_partial(tmp_path / "done", {}, 1, restart=False) as partial:
        partial.layer_done({"x": torch.zeros(1)}, {})
        partial.checkpoint.rename(tmp_path / "done")
    assert partial_folder(tmp_path / "done").exists()
    with open_partial(tmp_path / "busy", {}, 1, restart=False) as partial:
        partial.layer_done({"x": torch.zeros(1)}, {})
        partial.checkpoint.rename(tmp_path / "busy")
        with open_partial(tmp_path / "next", {}, 1, restart=False):
            left = sorted(path.name for path in tmp_path.glob(".*"))
    assert left == [".busy.partial", ".next.partial", ".undone.partial"]
