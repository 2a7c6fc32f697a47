"""Layers that are read when they run compute what the whole model does, and hold nothing between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pregate.base.errors import CheckpointError
from pregate.convert.files import assembly, streamed
from pregate.convert.files.streamed import load_any, load_whole
from pregate.convert.measure.control_table import control_rows
from pregate.convert.paths.decouple import decouple
from pregate.convert.paths.options import DecoupleOptions
from pregate.model.folder import read_folder
from pregate.model.gated_mlp import decoder_layers
from pregate.model.modeling import RoutedForCausalLM

ROWS = [[1, *range(5, 60)], [1, *range(100, 130)]]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every model were large."""
    monkeypatch.setattr(streamed, "WHOLE_BYTES", 0)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("kind", ["tiny_dense", "tiny_layerwise_checkpoint", "tiny_path_checkpoint"])
@torch.no_grad()
def test_it_is_the_whole_model(kind: str, request: pytest.FixtureRequest):
    folder = read_folder(request.getfixturevalue(kind))
    model, whole = load_any(folder), load_whole(folder)
    ids = torch.tensor([ROWS[0]])
    for _ in range(2):
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-5)
        held = [p for layer in decoder_layers(model) for n, p in layer.named_parameters() if "gate." not in n]
        assert held
        assert all(p.is_meta for p in held)
    if not isinstance(model, RoutedForCausalLM):
        return
    tables = [control_rows(m, ROWS, 100) for m in (model, whole)]
    for name, row in tables[1].items():
        assert tables[0][name] == pytest.approx(row, rel=1e-3), name
    assert model.generate(ids, max_new_tokens=4).tolist() == whole.generate(ids, max_new_tokens=4).tolist()


@pytest.mark.usefixtures("large")
def test_a_damaged_shard_is_named(tiny_layerwise_checkpoint: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_layerwise_checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match=rf"{shard.name}: damaged"):
        load_any(read_folder(copy))


@pytest.mark.parametrize("more", [{}, {"predict": True}], ids=str)
def test_a_model_is_decoupled_the_same(
    tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path: Path, more: dict, monkeypatch: pytest.MonkeyPatch
):
    options = DecoupleOptions(tiny_layerwise_checkpoint, tmp_path / "whole", (tiny_text,), steps=3, dim=16, **more)
    monkeypatch.setattr(assembly, "MOST_IN_ONE", 0)
    whole = decouple(options)
    monkeypatch.setattr(streamed, "WHOLE_BYTES", 0)
    read = decouple(replace(options, out=tmp_path / "read"))
    for name in ("loss_first", "loss_last", "layerwise_perplexity", "layerwise_active_share", "router_flops_per_token"):
        assert read.figures["decouple"][name] == pytest.approx(whole.figures["decouple"][name], rel=1e-3), name
    assert read.files.keys() == whole.files.keys()
    assert read_folder(tmp_path / "read").dtype == read_folder(tiny_layerwise_checkpoint).dtype
    source = sorted(tiny_layerwise_checkpoint.glob("*.safetensors"))
    copies = sorted((tmp_path / "read").glob("*.safetensors"))
    assert [p.read_bytes() for p in source] == [p.read_bytes() for p in copies[:-1]]
