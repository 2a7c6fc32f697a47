"""Defaults of `pregate convert` that follow what is given, and sentences that name what was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pregate.base.errors import UserError
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from tests.families import FAMILIES, save_random


def asked(**change: Any) -> ConvertOptions:
    given = {"model": "m", "out": "o", "experts": 8, "shared": 2, "active": 2, "calibration": ("a.txt",)}
    return ConvertOptions(**(given | change))


def test_defaults_fit_what_is_given():
    assert asked(gate="representative").selection == "top_k"
    assert asked(clustering="marks").shared_by == "contribution"
    assert asked(recipe="cmoe-paper").samples == 8
    assert asked(recipe="cmoe-paper", samples=3).samples == 3
    assert (asked().selection, asked().shared_by) == ("threshold", "capture")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gate": "representative", "selection": "threshold"}, "with --gate representative: top_k"),
        (
            {"recipe": "cmoe-paper", "selection": "threshold"},
            "with --recipe cmoe-paper, whose --gate is representative: top_k",
        ),
    ],
)
def test_what_cannot_be_together_is_named_as_it_was_given(change: dict[str, Any], sentence: str):
    with pytest.raises(UserError) as error:
        asked(**change)
    assert error.value.for_command_line == f"--selection threshold: allowed {sentence}"


def test_weights_are_stored_as_the_parents_are(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    dense = save_random(FAMILIES["llama"], tiny_dense, tmp_path / "dense", "bfloat16")
    convert(ConvertOptions(dense, tmp_path / "out", 8, 2, 3, (tiny_text,), samples=4, sequence_length=48))
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    weights = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    stored = {name: tensor.dtype for name, tensor in weights.items() if "embed_tokens" in name or "_proj" in name}
    assert stored and set(stored.values()) == {torch.bfloat16}
