"""Decouplings that are interrupted or cannot write: what stays, what goes on, and that the result is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pregate.base.errors import PregateError, UserError
from pregate.cli.main import main
from pregate.convert.files.partial import partial_folder, read_state
from pregate.convert.paths import targets, training
from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.convert.progress import Progress
from pregate.convert.text.batches import batches
from tests.convert.interruption import files_of_at_most

ROOT = Path(__file__).resolve().parents[3]
COLLECTING, TRAINING = "collecting targets", "training the path router"


class StopsIn(Progress):
    """Raises Ctrl-C once a stage has advanced so far; keeps what it was progress, stage by stage."""

    def __init__(self, stage: str = "", number: int = -1) -> None:
        self._stage, self._number = stage, number
        self.steps: dict[str, list[int]] = {}
        self.notes: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator:
        done = self.steps.setdefault(name, [])

        def advance(steps: int) -> None:
            done.append(steps)
            if name == self._stage and sum(done) >= self._number:
                raise KeyboardInterrupt

        yield advance
        assert sum(done) == total, name

    @contextmanager
    def doing(self, name: str) -> Iterator:
        yield
        self.steps[name] = [1]

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


@pytest.fixture
def options(
    tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> DecoupleOptions:
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    return DecoupleOptions(tiny_layerwise_checkpoint, tmp_path / "out", (tiny_text,), steps=7, dim=16)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def stop(options: DecoupleOptions, stage: str, number: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        decouple(options, StopsIn(stage, number))
    assert not options.out.exists()


@pytest.mark.parametrize("more", [{}, {"heads": "single"}, {"embedding": "parent"}, {"predict": True}], ids=str)
def test_it_goes_on_where_it_was_and_gives_the_same(options: DecoupleOptions, more: dict, tmp_path: Path):
    options = replace(options, **more)
    straight = decouple(replace(options, out=tmp_path / "straight"))
    stop(options, TRAINING, 5)
    state = read_state(options.out)
    assert state is not None
    assert state.layers_done == 4
    progress = StopsIn()
    resumed = decouple(options, progress)
    assert progress.notes[-1] == "going on after step 4 of 7, where the last run was interrupted"
    assert progress.steps[TRAINING] == [4, 1, 1, 1]
    assert len(progress.steps[COLLECTING]) == 1, "read at once, in one piece"
    assert resumed.figures == straight.figures
    assert shards(options.out) == shards(tmp_path / "straight")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "text") == ["out", "straight"]


def test_every_long_loop_has_a_stage(options: DecoupleOptions):
    """After the training it used to be silent for minutes."""
    progress = StopsIn()
    decouple(options, progress)
    reading = ["reading text", "checking files (bytes)", f"loading {options.model.name}"]
    measuring = ["setting thresholds", "comparing choices", "scoring layerwise", "scoring path"]
    assert list(progress.steps) == [*reading, COLLECTING, TRAINING, *measuring, "writing the checkpoint"]
    assert all(progress.steps.values())  # each to its total, which a stage checks as it ends


@pytest.mark.parametrize("more", [{}, {"predict": True}], ids=str)
def test_targets_are_kept_a_piece_at_a_time(
    options: DecoupleOptions, more: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """They take most of the time, and an interrupted run used to keep none."""
    monkeypatch.setattr(targets, "PIECE_TOKENS", 1)
    monkeypatch.setattr(targets, "batches", partial(batches, batch_tokens=200))
    options = replace(options, **more)
    counted = StopsIn()
    straight = decouple(replace(options, out=tmp_path / "straight"), counted)
    first, second, *others = counted.steps[COLLECTING]
    stop(options, COLLECTING, first + second)
    state = read_state(options.out)
    assert state is not None
    assert (state.layers_done, state.num_layers) == (first, first + second + sum(others))
    assert f"interrupted after document {first} of {state.num_layers}; " in state.interrupted
    progress = StopsIn()
    resumed = decouple(options, progress)
    where = f"document {first} of {state.num_layers}"
    assert progress.notes[-1].startswith(f"going on after {where}, where the last run was")
    assert resumed.figures == straight.figures
    assert shards(options.out) == shards(tmp_path / "straight")


def test_interrupted_before_a_piece_is_kept_it_leaves_nothing(options: DecoupleOptions):
    stop(options, COLLECTING, 1)
    assert list(options.out.parent.iterdir()) == []


def test_other_options_are_refused_and_restart_discards(options: DecoupleOptions):
    stop(options, TRAINING, 3)
    with pytest.raises(UserError, match=r"out .*\.out\.partial holds .*seed 0 there, 1 here.*restart"):
        decouple(replace(options, seed=1))
    manifest = decouple(replace(options, seed=1, restart=True))
    assert manifest.options["decouple"]["seed"] == 1
    assert "restart" not in manifest.options["decouple"]


def test_a_file_that_cannot_be_kept_is_one_sentence(options: DecoupleOptions):
    with files_of_at_most(1000), pytest.raises(PregateError, match=r"targets-00000\.safetensors cannot be written"):
        decouple(options)
    decouple(options)


@pytest.mark.slow
def test_a_killed_run_goes_on(capsys, options: DecoupleOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SIGKILL once it has kept some steps; then Ctrl-C's sentence; then to the end."""
    monkeypatch.undo()  # both keep every hundredth step
    arguments = ["decouple", "--model", options.model, "--text", *options.text, "--steps", 400, "--dim", 16]
    command = [str(a) for a in arguments]
    child = subprocess.Popen(
        [sys.executable, "-m", "pregate.cli.main", *command, "--out", str(options.out)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    state_path, deadline_s = partial_folder(options.out) / "state.json", time.monotonic() + 240
    kept: dict[str, Any] = {}
    while kept.get("unit") != "step" or not kept["layers_done"]:
        kept = json.loads(state_path.read_text()) if state_path.exists() else {}
        assert child.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    state = read_state(options.out)
    assert state is not None
    assert 100 <= state.layers_done < 400
    assert main([*command, "--out", str(options.out)]) == 0
    assert f"going on after step {state.layers_done} of 400" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "straight")]) == 0
    assert shards(options.out) == shards(tmp_path / "straight")


def test_ctrl_c_says_what_was_kept(options: DecoupleOptions, capsys, monkeypatch: pytest.MonkeyPatch):
    stop(options, TRAINING, 5)
    monkeypatch.setattr("pregate.convert.paths.decouple.decouple", _interrupted)
    arguments = ["decouple", "--model", options.model, "--out", options.out, "--text", *options.text]
    assert main([str(a) for a in arguments]) == 130
    sentence = "pregate: interrupted after step 4 of 7; the same command goes on there, with --restart it begins anew"
    assert sentence in capsys.readouterr().err


def _interrupted(*_args: object) -> None:
    raise KeyboardInterrupt
