"""Adapters: a checkpoint comes back bit for bit, is read in place, and no other parent will do."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pregate.base.errors import CheckpointError, UserError
from pregate.convert.export.apply import ApplyOptions, apply
from pregate.convert.export.run import ExportOptions, export
from pregate.convert.paths.decouple import decouple
from pregate.convert.paths.options import DecoupleOptions
from pregate.convert.tune.options import TuneOptions
from pregate.convert.tune.run import tune
from pregate.model.checkpoint import CheckpointReader, read_manifest
from pregate.model.file_hashes import file_sha256
from pregate.model.folder import read_folder
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.read_check import Hashes
from tests.convert.export.exporting import convert_stock
from tests.families import FAMILIES, save_random


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


def make(checkpoint: Path, parent: Path, out: Path, **options: Any) -> Path:
    export(ExportOptions(checkpoint, out, "adapter", parent=parent, **options))
    return out


@pytest.fixture(scope="module")
def path_adapter(tiny_path_checkpoint: Path, tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tiny_path_checkpoint, tiny_dense, tmp_path_factory.mktemp("adapters") / "path")


def test_every_file_comes_back_bit_for_bit(path_adapter, tiny_path_checkpoint, tiny_dense, tmp_path):
    apply(ApplyOptions(tiny_dense, path_adapter, tmp_path / "again"))
    assert hashes(tmp_path / "again") == hashes(tiny_path_checkpoint)
    assert not (path_adapter / "tokenizer.json").exists()  # it is the parent's


@pytest.mark.parametrize(
    ("family", "stored_as", "dtype"),
    [
        ("llama tied", "bfloat16", "bfloat16"),
        ("llama tied", "float32", "bfloat16"),
        ("phi3", "bfloat16", "float32"),
        ("gemma3", "float16", "float16"),
        ("qwen2", "float32", "float32"),
    ],
)
def test_families_and_types_come_back(family, stored_as, dtype, tiny_dense, tiny_text, tmp_path):
    """Fused gate and up, tied heads, and parents stored as another type than the checkpoint."""
    dense = save_random(FAMILIES[family], tiny_dense, tmp_path / "dense", stored_as)
    routed = convert_stock(dense, tmp_path / "routed", tiny_text, samples=2, sequence_length=12, dtype=dtype)
    adapter = make(routed, dense, tmp_path / "adapter")
    apply(ApplyOptions(dense, adapter, tmp_path / "again"))
    assert hashes(tmp_path / "again") == hashes(routed)


def test_experts_that_overlap_come_back(cut, tiny_dense, tmp_path):
    adapter = make(cut, tiny_dense, tmp_path / "adapter")
    apply(ApplyOptions(tiny_dense, adapter, tmp_path / "again"))
    assert hashes(tmp_path / "again") == hashes(cut)


def test_units_and_model_are_read_from_the_parent(path_adapter, tiny_path_checkpoint, tiny_dense):
    whole, made = CheckpointReader(tiny_path_checkpoint), CheckpointReader(path_adapter, tiny_dense)
    assert made.fingerprint == whole.fingerprint
    for layer, cut_ in enumerate(whole.config.cuts):
        assert made.unit_bytes(layer) == whole.unit_bytes(layer)
        for expert in reversed(range(cut_.num_routed)):
            for ours, theirs in zip(made.read_unit(layer, expert), whole.read_unit(layer, expert), strict=True):
                assert torch.equal(ours, theirs)
    ours = RoutedForCausalLM.from_pretrained(path_adapter, parent=tiny_dense).state_dict()
    theirs = RoutedForCausalLM.from_pretrained(tiny_path_checkpoint).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_tokenizer_of_an_adapter_is_found(path_adapter, tiny_path_checkpoint, tiny_dense):
    folder = read_folder(path_adapter, parent=tiny_dense)
    assert (
        folder.tokenizer("the bell")["input_ids"]
        == read_folder(tiny_path_checkpoint).tokenizer("the bell")["input_ids"]
    )


def test_another_parent_is_refused_by_name(path_adapter, tiny_dense, tmp_path):
    other = shutil.copytree(tiny_dense, tmp_path / "other")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (other / "model.safetensors").write_bytes(data)
    named = (
        r"--parent .*other: its model\.safetensors is not that of tiny-dense, which path was made from: its sha256 is"
    )
    with pytest.raises(CheckpointError) as refused:
        apply(ApplyOptions(other, path_adapter, tmp_path / "out"))
    assert re.search(named, refused.value.for_command_line)
    with pytest.raises(CheckpointError, match="is not that of tiny-dense"):
        RoutedForCausalLM.from_pretrained(path_adapter, parent=other)
    (other / "model.safetensors").write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match=r"it has \d+ bytes and not \d+"):
        CheckpointReader(path_adapter, other)
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_its_parent_says_what_to_do(path_adapter):
    with pytest.raises(UserError, match="is an adapter; give it with adapter and its parent with parent, or make it"):
        read_folder(path_adapter)
    with pytest.raises(UserError, match="is an adapter"):
        RoutedForCausalLM.from_pretrained(path_adapter)


def test_a_damaged_adapter_is_named(path_adapter, tiny_dense, tmp_path):
    copy = shutil.copytree(path_adapter, tmp_path / "copy")
    data = bytearray((copy / "adapter.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "adapter.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors: its sha256 is"):
        apply(ApplyOptions(tiny_dense, copy, tmp_path / "out"))


def test_what_is_hashed_while_it_is_read_is_refused_in_the_end(path_adapter, tiny_dense, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parent, own = shutil.copytree(tiny_dense, tmp_path / "dense"), shutil.copytree(path_adapter, tmp_path / "own")
    for adapter, dense, changed, sentence in (
        (
            path_adapter,
            parent,
            parent / "model.safetensors",
            r"its model\.safetensors is not that of tiny-dense, which",
        ),
        (own, tiny_dense, own / "adapter.safetensors", r"own/adapter\.safetensors: its sha256 is not"),
    ):
        with CheckpointReader(adapter, dense, hashes=Hashes.WHILE_READ).checked():
            pass
        data = bytearray(changed.read_bytes())
        data[-1] ^= 1
        changed.write_bytes(data)
        reader = CheckpointReader(adapter, dense, hashes=Hashes.WHILE_READ)
        with pytest.raises(CheckpointError, match=sentence), reader.checked():
            reader.read_unit(0, 0)


def test_a_model_tuned_in_full_is_refused_by_name(tiny_layerwise_checkpoint, tiny_dense, tiny_text, tmp_path):
    options = {"text": (tiny_text,), "steps": 20, "kl_share": 0.0, "learning_rate": 2e-3}
    tune(TuneOptions(model=tiny_layerwise_checkpoint, out=tmp_path / "tuned", **options))
    with pytest.raises(
        UserError, match=r"is not that of .*tiny-dense: it was tuned in full; an adapter holds a tuning"
    ):
        make(tmp_path / "tuned", tiny_dense, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("table", ["int8", "projected"])
def test_a_smaller_table_makes_a_checkpoint_of_its_own(table, tiny_path_checkpoint, tiny_dense, tiny_text, tmp_path):
    """What `apply` gives then is what the adapter is read as, and its manifest says what was measured."""
    adapter = make(tiny_path_checkpoint, tiny_dense, tmp_path / "adapter", router_table=table, text=(tiny_text,))
    apply(ApplyOptions(tiny_dense, adapter, tmp_path / "again"))
    ours = RoutedForCausalLM.from_pretrained(adapter, parent=tiny_dense)
    theirs = RoutedForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(t, ours.state_dict()[name]) for name, t in theirs.state_dict().items())
    reader = CheckpointReader(tmp_path / "again", hashes=Hashes.FIRST)
    assert reader.fingerprint == CheckpointReader(adapter, tiny_dense).fingerprint
    measured = reader.manifest.figures["adapter"]
    assert reader.manifest.options["adapter"] == {"router_table": table}
    assert 0 < measured["same_paths"] <= 1
    assert measured["checkpoint_perplexity"] > 1
    assert measured["adapter_perplexity"] > 1


def tuned_by_lora(model: Path, text: Path, out: Path, **more: Any) -> Path:
    options: dict[str, Any] = {"text": (text,), "steps": 12, "kl_share": 0.0, "method": "lora", "refit": False} | more
    tune(TuneOptions(model=model, out=out, learning_rate=1e-2, rank=2, **options))
    return out


def test_a_projected_table_and_lora_come_back(tiny_dense, tiny_text, tmp_path):
    """convert in bfloat16, tune by LoRA, decouple with the parent's embedding, tune by LoRA again: all factors."""
    routed = convert_stock(tiny_dense, tmp_path / "routed", tiny_text, samples=2, sequence_length=12, dtype="bfloat16")
    once = tuned_by_lora(routed, tiny_text, tmp_path / "once")
    decouple(DecoupleOptions(once, tmp_path / "paths", (tiny_text,), steps=5, dim=16, embedding="parent"))
    twice = tuned_by_lora(tmp_path / "paths", tiny_text, tmp_path / "twice")
    alone = tmp_path / "alone"
    text, budget = (tiny_text,), {"steps": 12, "kl_share": 0.0}
    tune(TuneOptions(model=tmp_path / "paths", out=alone, text=text, ffn=False, backbone=False, **budget))
    assert read_manifest(alone).figures["tune"]["best_step"] > 0
    for number, checkpoint in enumerate((once, tmp_path / "paths", twice, alone)):
        adapter = make(checkpoint, tiny_dense, tmp_path / f"adapter-{number}")
        held = load_file(adapter / "adapter.safetensors")
        assert not any("experts" in name or name == "path_router.embedding.weight" for name in held)
        apply(ApplyOptions(tiny_dense, adapter, tmp_path / f"again-{number}"))
        assert hashes(tmp_path / f"again-{number}") == hashes(checkpoint)
    factors = load_file(twice / "factors.safetensors")
    assert "path_router.embedding.weight.projection" in factors
    assert factors["parent.model.layers.0.mlp.experts.down_proj.up.1"].any()
    assert factors["parent.model.layers.0.mlp.experts.down_proj.up.0"].any()


def test_lora_after_a_fit_in_closed_form_is_refused_by_name(tiny_path_checkpoint, tiny_dense, tiny_text, tmp_path):
    tuned = tuned_by_lora(tiny_path_checkpoint, tiny_text, tmp_path / "tuned", refit=True)
    with pytest.raises(UserError, match=r"fitted anew \(refit\)"):
        make(tuned, tiny_dense, tmp_path / "adapter")
