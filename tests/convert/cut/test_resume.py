"""Conversions that are interrupted: what stays, what goes on, what is refused; and that the result is the same."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from pregate.base.errors import PregateError, UserError
from pregate.cli.main import main
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.files import dense
from pregate.convert.files.partial import PartialCheckpoint, open_partial, partial_folder, read_state
from tests.convert.interruption import StopsAfter, interrupt
from tests.families import FAMILIES, save_random

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def options(tiny_dense: Path, tiny_text: Path, tmp_path: Path) -> ConvertOptions:
    return ConvertOptions(tiny_dense, tmp_path / "out", 8, 2, 2, (tiny_text,), samples=8, sequence_length=64)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_it_goes_on_where_it_was_and_gives_the_same(options: ConvertOptions, num_layers: int, tmp_path: Path):
    straight = convert(replace(options, out=tmp_path / "straight"))
    interrupt(options, num_layers)
    state = read_state(options.out)
    assert state is not None
    assert (state.layers_done, state.num_layers) == (num_layers, 3)
    progress = StopsAfter(-1)
    resumed = convert(options, progress)
    assert progress.steps == [num_layers] + [1] * (3 - num_layers)
    assert progress.notes == [f"going on after layer {num_layers} of 3, where the last run was interrupted"]
    assert resumed.files == straight.files
    assert resumed.figures == straight.figures
    assert sorted(p.name for p in options.out.parent.iterdir()) == ["out", "straight"]


def test_nothing_is_computed_twice(options: ConvertOptions):
    interrupt(options, 2)
    shard = partial_folder(options.out) / "checkpoint" / "model-00001-of-00004.safetensors"
    before = (shard.stat().st_ino, shard.stat().st_mtime_ns)
    convert(options)
    after = (options.out / shard.name).stat()
    assert (after.st_ino, after.st_mtime_ns) == before


def test_interrupted_before_a_layer_is_done_it_leaves_nothing(options: ConvertOptions):
    interrupt(options, 0)
    assert list(options.out.parent.iterdir()) == []


def ctrl_c_after(monkeypatch: pytest.MonkeyPatch, num_layers: int) -> None:
    """Let Ctrl-C come right after that many layers are done."""
    layer_done = PartialCheckpoint.layer_done

    def done_and_interrupted(self: PartialCheckpoint, *args: Any) -> None:
        layer_done(self, *args)
        if self.state.layers_done == num_layers:
            raise KeyboardInterrupt

    monkeypatch.setattr(PartialCheckpoint, "layer_done", done_and_interrupted)


def test_a_killed_conversion_goes_on(
    capsys, monkeypatch: pytest.MonkeyPatch, tiny_dense: Path, tiny_text: Path, tmp_path: Path
):
    """SIGKILL at whatever it is doing once its third shard is there; then Ctrl-C; then to the end."""
    source = tmp_path / "dense"
    config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=24)
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    AutoTokenizer.from_pretrained(tiny_dense).save_pretrained(source)
    arguments = ["convert", "--model", source, "--experts", 8, "--shared", 2, "--active", 2, "--samples", 8]
    arguments = [str(a) for a in [*arguments, "--sequence-length", 64, "--calibration", tiny_text]]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pregate.cli.main", *arguments, "--out", str(out)]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    third = partial_folder(out) / "checkpoint" / "model-00003-of-00025.safetensors"
    deadline_s = time.monotonic() + 600
    while not third.exists():
        assert child.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    state = read_state(out)
    assert state is not None
    assert 2 <= state.layers_done < 21
    with monkeypatch.context() as patched:
        ctrl_c_after(patched, state.layers_done + 3)
        assert main([*arguments, "--out", str(out)]) == 130
    said = capsys.readouterr().err
    assert f"going on after layer {state.layers_done} of 24" in said
    assert re.search(
        rf"^pregate: interrupted after layer {state.layers_done + 3} of 24; the same command goes on there", said, re.M
    )
    assert main([*arguments, "--out", str(out)]) == 0
    assert main([*arguments, "--out", str(tmp_path / "straight")]) == 0
    for path in sorted((tmp_path / "straight").iterdir()):
        if path.name != "manifest.json":  # it names --out
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "straight").iterdir()}
    assert not partial_folder(out).exists()


def test_other_options_are_refused_and_restart_discards(options: ConvertOptions, tmp_path: Path):
    interrupt(options, 1)
    other = replace(options, seed=1)
    with pytest.raises(UserError, match=r"out .*\.out\.partial holds .*seed 0 there, 1 here.*restart") as error:
        convert(other)
    assert str(partial_folder(options.out)) in str(error.value)
    assert read_state(options.out) is not None
    convert(replace(other, restart=True))
    straight = convert(replace(other, out=tmp_path / "straight"))
    assert {p.name: p.read_bytes() for p in options.out.glob("*.safetensors")} == {
        p.name: p.read_bytes() for p in (tmp_path / "straight").glob("*.safetensors")
    }
    assert straight.options["seed"] == 1
    assert "restart" not in straight.options


def test_another_source_or_text_is_refused(options: ConvertOptions, tiny_text: Path, tmp_path: Path):
    interrupt(options, 1)
    text = tmp_path / "text" / "other.txt"
    text.parent.mkdir()
    text.write_text("A different harbour. " * 400)
    with pytest.raises(UserError, match="calibration text"):
        convert(replace(options, calibration=(text,)))
    moved = tmp_path / "text" / "same.txt"
    moved.write_bytes(tiny_text.read_bytes())
    convert(replace(options, calibration=(moved,)))  # the same words elsewhere are the same text


@pytest.mark.parametrize("hashed_bytes", [0, 2 << 30])
def test_another_model_of_the_same_architecture_is_refused(
    hashed_bytes: int, options: ConvertOptions, tiny_dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Config and index are equal, only weights differ: it holds for shards that are hashed and for those too large."""
    monkeypatch.setattr(dense, "HASHED_BYTES", hashed_bytes)
    first = save_random(FAMILIES["llama"], tiny_dense, tmp_path / "first", max_shard_size="40KB")
    other = tmp_path / "other"
    shutil.copytree(first, other)
    shards = sorted(other.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    assert (first / dense.INDEX).read_bytes() == (other / dense.INDEX).read_bytes()
    interrupt(replace(options, model=first), 1)
    with pytest.raises(UserError, match=r"out .*model \S+first there, \S+other here.*the model's shards"):
        convert(replace(options, model=other))
    written = (first / shards[0].name).stat()
    os.utime(first / shards[0].name, ns=(written.st_atime_ns, written.st_mtime_ns + 1))
    with pytest.raises(UserError, match=r"differs \(the model's shards \w+ there, \w+ here\)"):
        convert(replace(options, model=first))
    os.utime(first / shards[0].name, ns=(written.st_atime_ns, written.st_mtime_ns))
    monkeypatch.chdir(tmp_path)
    convert(replace(options, model=Path("first")))  # the same folder, named otherwise


def test_one_conversion_at_a_time(options: ConvertOptions):
    with open_partial(options.out, {}, 3, restart=False) as partial:
        for restart in (False, True):
            with pytest.raises(UserError, match=r"out .*another conversion is writing it"):
                convert(replace(options, restart=restart))
        assert partial.checkpoint.is_dir()
    assert list(options.out.parent.iterdir()) == []
    convert(options)


def test_a_state_that_cannot_be_read_names_the_way_out(options: ConvertOptions):
    interrupt(options, 1)
    (partial_folder(options.out) / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json cannot be read .*restart discards"):
        convert(options)
    convert(replace(options, restart=True))


def test_hidden_states_that_are_gone_name_the_way_out(options: ConvertOptions):
    interrupt(options, 1)
    (partial_folder(options.out) / "hidden-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"hidden-00001\.safetensors is missing; restart discards"):
        convert(options)


def test_a_shard_that_cannot_be_written_keeps_what_is_done(options: ConvertOptions):
    interrupt(options, 1)
    obstacle = partial_folder(options.out) / "checkpoint" / "model-00002-of-00004.safetensors.tmp"
    obstacle.mkdir()
    with pytest.raises(PregateError, match=r"out .*model-00002-of-00004\.safetensors cannot be written"):
        convert(options)
    obstacle.rmdir()
    progress = StopsAfter(-1)
    convert(options, progress)
    assert progress.steps == [1, 1, 1]
