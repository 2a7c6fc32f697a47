"""Tuning runs that are interrupted: what stays, what goes on, what is refused; and that the curve is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pregate.base.errors import PregateError, UserError
from pregate.cli.main import main
from pregate.convert.files.partial import open_partial, partial_folder, read_state
from pregate.convert.tune.options import TuneOptions
from pregate.convert.tune.run import tune
from tests.convert.interruption import StopsAfter
from tests.convert.tune.tuning import tiny_options

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def options(tiny_path_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> TuneOptions:
    return tiny_options(tiny_path_checkpoint, tiny_text, tmp_path / "out", checkpoint_every=4)


def interrupt(options: TuneOptions, at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(options, StopsAfter(at))
    assert not options.out.exists()


def read_step(out: Path) -> int | None:
    state = read_state(out)
    return None if state is None else state.layers_done


def curve_of(folder: Path) -> list[dict[str, float]]:
    """The curve without its times."""
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_curve(first: Path, second: Path) -> None:
    one, two = curve_of(first), curve_of(second)
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "lora", "balance": "bias", "refit": True},
        {"accumulate": 2, "balance": "loss", "router": False, "eval_every": 3},
    ],
)
def test_it_goes_on_where_it_was_and_gives_the_same(options: TuneOptions, changes: dict[str, Any], tmp_path: Path):
    options = replace(options, **changes)
    straight = tune(replace(options, out=tmp_path / "straight"))
    interrupt(options, 10 if options.refit else 7)  # the three layers of a refit count
    assert read_step(options.out) == 4
    progress = StopsAfter(-1)
    resumed = tune(options, progress)
    assert "going on after step 4, where the last run was interrupted" in progress.notes
    shown = {name.split(" (")[0]: (done, total) for name, done, total in progress.stages}
    assert {"tuning", "validating", "setting thresholds"} <= shown.keys()
    assert all(done == total for done, total in shown.values())
    assert_same_curve(options.out, tmp_path / "straight")
    assert resumed.figures["tune"]["steps"] == 12
    for path in (tmp_path / "straight").glob("*.safetensors"):
        assert path.read_bytes() == (options.out / path.name).read_bytes()
    assert straight.figures["tune"].keys() == resumed.figures["tune"].keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "straight"]


@pytest.mark.parametrize("kind", ["layerwise", "dense"])
def test_gates_and_dense_models_go_on_too(
    kind: str, tiny_layerwise_checkpoint: Path, tiny_dense: Path, options: TuneOptions, tmp_path: Path
):
    options = replace(options, model=tiny_layerwise_checkpoint if kind == "layerwise" else tiny_dense)
    interrupt(options, 10)
    tune(options)
    tune(replace(options, out=tmp_path / "straight"))
    assert_same_curve(options.out, tmp_path / "straight")


def test_a_killed_run_goes_on_to_the_same_curve(tiny_path_checkpoint: Path, tiny_text: Path, tmp_path: Path):
    """SIGKILL at whatever a process is doing once it is half-way; then to the end, and once more without."""
    arguments = ["tune", "--model", tiny_path_checkpoint, "--text", tiny_text, "--steps", 60, "--eval-every", 20]
    arguments += ["--checkpoint-every", 3, "--batch-tokens", 256, "--sequence-length", 64, "--learning-rate", 3e-3]
    arguments = [str(a) for a in [*arguments, "--device", "cpu"]]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pregate.cli.main", *arguments, "--out", str(out)]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline_s = time.monotonic() + 600
    while (read_step(out) or 0) < 30:
        assert child.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    assert not out.exists()
    step = read_step(out)
    assert step is not None
    assert 30 <= step < 60
    assert main([*arguments, "--out", str(out)]) == 0
    assert main([*arguments, "--out", str(tmp_path / "straight")]) == 0
    assert_same_curve(out, tmp_path / "straight")
    assert not partial_folder(out).exists()


def test_the_fit_before_the_first_step_is_kept(options: TuneOptions, tmp_path: Path):
    options = replace(options, refit=True)
    interrupt(options, 4)  # in the first step after the three layers of the fit
    assert read_step(options.out) == 0
    progress = StopsAfter(-1)
    tune(options, progress)
    assert "going on after step 0, where the last run was interrupted" in progress.notes
    tune(replace(options, out=tmp_path / "straight"))
    assert_same_curve(options.out, tmp_path / "straight")


def test_slow_steps_are_kept_as_well(options: TuneOptions, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pregate.convert.tune.run.CHECKPOINT_S", 0.0)
    interrupt(options, 3)  # only the fourth step is due by count
    assert read_step(options.out) == 2


def test_interrupted_before_a_checkpoint_it_leaves_nothing(options: TuneOptions):
    interrupt(options, 3)
    assert list(options.out.parent.iterdir()) == []


def test_ctrl_c_says_how_to_go_on(
    options: TuneOptions, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny_text: Path
):
    monkeypatch.setattr("pregate.cli.printed.RichProgress", lambda: StopsAfter(7))
    arguments = ["tune", "--model", options.model, "--text", tiny_text, "--out", options.out, "--checkpoint-every", 4]
    assert main([str(a) for a in [*arguments, "--steps", 12, "--batch-tokens", 256, "--no-refit"]]) == 130
    assert (
        "pregate: interrupted after step 4; the same command goes on there, with --restart" in capsys.readouterr().err
    )


def test_other_options_are_refused_and_restart_discards(options: TuneOptions, tmp_path: Path):
    interrupt(options, 7)
    other = replace(options, seed=1, kl_share=0.25)
    reason = r"out .*\.out\.partial holds .* that differs .*kl_share 0\.\d+ there, 0\.25 here.*seed 0"
    with pytest.raises(UserError, match=reason):
        tune(other)
    assert read_step(options.out) == 4
    tune(replace(other, restart=True))
    tune(replace(other, out=tmp_path / "straight"))
    assert_same_curve(options.out, tmp_path / "straight")


def test_one_run_at_a_time(options: TuneOptions):
    with open_partial(options.out, {}, 0, restart=False):
        for restart in (False, True):
            with pytest.raises(UserError, match=r"out .*another tuning run is writing it"):
                tune(replace(options, restart=restart))
    assert list(options.out.parent.iterdir()) == []


@pytest.mark.parametrize("damage", ["state", "tensors"])
def test_what_cannot_be_read_names_the_way_out(options: TuneOptions, damage: str):
    interrupt(options, 7)
    folder = partial_folder(options.out)
    if damage == "state":
        (folder / "state.json").write_text("{")
    else:
        next(folder.glob("hidden-*")).unlink()
    with pytest.raises(UserError, match=r"restart discards"):
        tune(options)
    assert tune(replace(options, restart=True)).figures["tune"]["steps"] == 12


def test_a_checkpoint_that_cannot_be_written_keeps_the_last(options: TuneOptions):
    interrupt(options, 7)
    folder = partial_folder(options.out)
    obstacle = folder / "hidden-00008.safetensors.tmp"
    obstacle.mkdir()
    with pytest.raises(PregateError, match=r"out .*cannot be written .*what is done is kept"):
        tune(options)
    assert read_step(options.out) == 4
    assert load_file(folder / "hidden-00004.safetensors")
    obstacle.rmdir()
    assert tune(options).figures["tune"]["steps"] == 12
