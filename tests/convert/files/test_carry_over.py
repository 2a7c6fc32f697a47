"""Every step writes what it read: what ends a text, and how its maker would pick tokens, is in each checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.export.run import ExportOptions, export
from pregate.convert.paths.decouple import decouple
from pregate.convert.paths.options import DecoupleOptions
from pregate.convert.tune.options import TuneOptions
from pregate.convert.tune.run import tune
from pregate.model.folder import read_folder

SAID = {"bos_token_id": 1, "eos_token_id": [1, 2], "repetition_penalty": 1.3, "stop_strings": ["\n\n"]}


@pytest.mark.parametrize("name", ["tiny", "stories3M"])
def test_every_step_carries_generation_settings_over(
    name: str, tiny_dense: Path, tiny_text: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    """A parent that ends on two ids, of which its config names one."""
    source, said = tiny_dense, SAID
    if name != "tiny":
        source = request.getfixturevalue("shared_folder") / "models" / name
        said = json.loads((source / "generation_config.json").read_text())
    dense = tmp_path / "dense"
    dense.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, dense / file.name)
    (dense / "generation_config.json").write_text(json.dumps(said))
    convert(ConvertOptions(dense, tmp_path / "cut", 8, 2, 3, (tiny_text,), samples=2, sequence_length=48))
    decouple(DecoupleOptions(tmp_path / "cut", tmp_path / "paths", (tiny_text,), steps=2))
    tune(TuneOptions(model=tmp_path / "paths", out=tmp_path / "tuned", text=(tiny_text,), steps=1, refit=False))
    export(ExportOptions(tmp_path / "cut", tmp_path / "again", "dense"))
    for made in ("cut", "paths", "tuned", "again"):
        assert json.loads((tmp_path / made / "generation_config.json").read_text()) == said, made
        assert read_folder(tmp_path / made).eos_ids == {1, 2}
