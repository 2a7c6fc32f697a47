"""Too little text is refused by every command that learns from text or measures on it, before a model is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pregate.cli.main import main


@pytest.mark.parametrize(
    ("command", "checkpoint", "options"),
    [
        ("convert", "tiny_dense", ("--experts", 8, "--shared", 2, "--active", 2)),
        ("decouple", "tiny_layerwise_checkpoint", ()),
        ("tune", "tiny_layerwise_checkpoint", ("--steps", 2)),
        ("read-me", "tiny_dense", ()),
        ("evaluate", "tiny_layerwise_checkpoint", ()),
        ("report", "tiny_layerwise_checkpoint", ()),
        ("export", "stock_checkpoint", ("--format", "qwen2_moe")),
    ],
)
def test_too_little_text_is_refused(
    command: str, checkpoint: str, options: tuple, request: pytest.FixtureRequest, tmp_path: Path, capsys
):
    """A file with a few words gave figures that were None, or a checkpoint twice as bad."""
    texts = []
    for name in ("few", "words"):
        records = [json.dumps({"text": f"{word} harbour lay quiet"}) for word in ("the", "a", "no", "one")]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(records))
        texts.append(tmp_path / f"{name}.jsonl")
    option = {"convert": "--calibration", "read-me": "--domain"}.get(command, "--text")
    out = () if command == "evaluate" else ("--out", tmp_path / "out")
    given = [command, "--model", request.getfixturevalue(checkpoint), *out, option, *texts, *options]
    assert main([str(argument) for argument in given]) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    least = r"\d+ are the least .*are enough" if command == "convert" else r"100 are the least, [\d,]+ are enough"
    assert re.match(rf"pregate: {option} \S*few.jsonl.*: (holds|its text gives) .*; {least}", sentence), sentence
    assert not (tmp_path / "out").exists()


def test_validation_text_of_its_own_is_held_to_it_too(tiny_dense: Path, tiny_text: Path, tmp_path: Path, capsys):
    (tmp_path / "word.txt").write_text("harbour lay quiet")
    given = ["tune", "--model", tiny_dense, "--out", tmp_path / "out", "--text", tiny_text, "--steps", 2]
    assert main([str(a) for a in [*given, "--validation", tmp_path / "word.txt"]]) == 2
    assert re.search(r"--validation \S*word.txt: holds \d+ tokens of text; 100 are the least", capsys.readouterr().err)
