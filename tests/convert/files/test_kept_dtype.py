"""The type a parent is stored in is kept through every step, whether its config says it or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.export.options import ExportOptions
from pregate.convert.export.run import export
from pregate.convert.files.shards import DenseShards
from pregate.convert.paths.decouple import decouple
from pregate.convert.paths.options import DecoupleOptions
from pregate.convert.tune.options import TuneOptions
from pregate.convert.tune.run import tune
from pregate.model.folder import read_folder
from pregate.model.layers import kept_float32


@pytest.fixture
def parent(tiny_dense: Path, tmp_path: Path) -> Path:
    """The tiny model in bfloat16, with a config that does not say so."""
    folder = tmp_path / "parent"
    shutil.copytree(tiny_dense, folder)
    AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    return folder


def stored(folder: Path) -> tuple[set[str], str]:
    """The types its weights have, and what its config says."""
    types = DenseShards(folder).weight_types
    return {dtype for name, dtype in types.items() if not kept_float32(name)}, read_folder(folder).dtype


def test_bfloat16_stays_bfloat16(parent: Path, tiny_text: Path, tmp_path: Path):
    routed = tmp_path / "routed"
    convert(ConvertOptions(parent, routed, 8, 2, 2, (tiny_text,), recipe="stock", samples=4, sequence_length=32))
    decouple(DecoupleOptions(routed, tmp_path / "paths", (tiny_text,), steps=2, dim=16))
    decouple(DecoupleOptions(routed, tmp_path / "single", (tiny_text,), steps=2, dim=16, heads="single"))
    for source, out in ((tmp_path / "paths", "tuned"), (parent, "control")):
        tune(TuneOptions(model=source, out=tmp_path / out, text=(tiny_text,), steps=1))
    export(ExportOptions(routed, tmp_path / "dense", "dense"))
    export(ExportOptions(routed, tmp_path / "qwen2_moe", "qwen2_moe"))
    for name in ("routed", "paths", "single", "tuned", "control", "dense", "qwen2_moe"):
        assert stored(tmp_path / name) == ({"bfloat16"}, "bfloat16"), name
