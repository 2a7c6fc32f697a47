"""A disk that is full: one sentence, and with room the same command goes on to what it would have written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pregate.cli.main import main
from tests.convert.interruption import files_of_at_most

COMMANDS = {
    "convert": "--experts 8 --shared 2 --active 2 --samples 4 --sequence-length 64 --calibration",
    "decouple": "--steps 7 --dim 16 --text",
    "tune": "--steps 3 --batch-tokens 256 --no-refit --text",
}
#: Convert's largest file is of its first layer, tune's its first checkpoint; decouple's training is done by then.
KEPT = {"decouple": "going on after step 7 of 7"}


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_sentence_and_work_goes_on(
    name: str, tiny_dense: Path, tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys
):
    model = tiny_dense if name == "convert" else tiny_layerwise_checkpoint
    command = [name, "--model", str(model), *COMMANDS[name].split(), str(tiny_text), "--out"]
    assert main([*command, str(tmp_path / "straight")]) == 0
    straight = contents(tmp_path / "straight")
    capsys.readouterr()
    out = tmp_path / "out"
    with files_of_at_most(max(map(len, straight.values())) - 1):
        assert main([*command, str(out)]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert re.search(rf"^pregate: --out {out}: .* cannot be written .* the same command goes on$", said, re.M)
    assert not out.exists()
    assert main([*command, str(out)]) == 0
    assert KEPT.get(name, "") in capsys.readouterr().err
    assert contents(out) == straight
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
