"""Checkpoints: round trips bit for bit, single units, and what is said of damaged or foreign folders."""

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pregate.model  # noqa: F401 (registers the Auto classes)
from pregate.base.errors import CheckpointError, UserError
from pregate.model.checkpoint import CheckpointReader, Manifest, new_folder
from pregate.model.modeling import RoutedForCausalLM


@pytest.fixture
def copy(tiny_path_checkpoint, tmp_path):
    return shutil.copytree(tiny_path_checkpoint, tmp_path / "copy")


def test_round_trip_is_bit_for_bit(tiny_path_checkpoint, tmp_path):
    first: Any = AutoModelForCausalLM.from_pretrained(tiny_path_checkpoint)
    assert type(first) is RoutedForCausalLM
    first.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    second = RoutedForCausalLM.from_pretrained(tmp_path / "again")
    before, after = first.state_dict(), second.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert second.manifest is not None
    assert second.manifest.method == first.manifest.method
    assert second.config.to_dict()["layer_cuts"] == first.config.to_dict()["layer_cuts"]


@pytest.mark.parametrize(
    ("method", "tuned", "under_gates", "along_paths"),
    [
        ("cmoe+decouple", False, False, False),
        ("cmoe+tune", True, True, True),
        ("cmoe+tune+decouple", True, True, False),
        ("cmoe+tune+decouple+tune", True, True, True),
        ("cmoe+decouple+tune", True, True, True),
        ("untuned", False, False, False),
    ],
)
def test_a_method_says_what_the_weights_were_tuned_under(method, tuned, under_gates, along_paths):
    manifest = Manifest(method)
    assert manifest.is_tuned == tuned
    assert (manifest.fits_routing("layerwise"), manifest.fits_routing("path")) == (under_gates, along_paths)


def test_round_trip_through_bf16_keeps_the_path_router_in_fp32(tiny_path_checkpoint, tmp_path):
    model = RoutedForCausalLM.from_pretrained(tiny_path_checkpoint, dtype=torch.bfloat16)
    assert model.path_router.heads.weight.dtype == torch.float32
    assert model.routed_mlps[0].experts.down_proj.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "half")
    again = RoutedForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_unit_is_a_slice_of_the_layers_experts(tiny_path_checkpoint):
    reader = CheckpointReader(tiny_path_checkpoint)
    model = RoutedForCausalLM.from_pretrained(tiny_path_checkpoint)
    for layer, mlp in enumerate(model.routed_mlps):
        for expert in range(mlp.cut.num_routed):
            gate_up, down = reader.read_unit(layer, expert)
            assert torch.equal(gate_up, mlp.experts.gate_up_proj[expert])
            assert torch.equal(down, mlp.experts.down_proj[expert])
            assert reader.unit_bytes(layer) == 4 * (gate_up.numel() + down.numel())


@pytest.mark.parametrize("unit", [(0, 6), (3, 0), (-1, 0), (0, -1)])
def test_units_outside_the_checkpoint_are_refused(tiny_path_checkpoint, unit):
    with pytest.raises(UserError, match="not in this checkpoint"):
        CheckpointReader(tiny_path_checkpoint).read_unit(*unit)


def test_a_flipped_byte_is_found(copy):
    shard = copy / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        RoutedForCausalLM.from_pretrained(copy)


def test_a_shard_cut_short_is_found_without_hashing(copy):
    shard = copy / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: \d+ bytes, the manifest says"):
        CheckpointReader(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        RoutedForCausalLM.from_pretrained(copy)


def test_an_edited_config_is_found(copy):
    config = json.loads((copy / "config.json").read_text())
    config["layer_cuts"][0]["num_active"] = 1
    (copy / "config.json").write_text(json.dumps(config, indent=2))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        RoutedForCausalLM.from_pretrained(copy)


def test_a_dense_folder_is_foreign(tiny_dense):
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing; not a pregate checkpoint"):
        CheckpointReader(tiny_dense)


def test_another_format_version_is_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text()) | {"format_version": 99}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format version 99; allowed: 2; convert the dense model again"):
        CheckpointReader(copy)


def test_missing_experts_are_never_made_up(copy):
    """A shard without a layer's experts, with a manifest that fits it, is refused: no random weights."""
    tensors = load_file(copy / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "layers.1.mlp.experts" not in n}
    assert len(kept) == len(tensors) - 2
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    from pregate.model.checkpoint import read_manifest, write_manifest

    write_manifest(copy, read_manifest(copy))
    with pytest.raises(CheckpointError, match="layer 1 has 6 routed experts but no weights"):
        CheckpointReader(copy)
    with pytest.raises(CheckpointError, match=r"the shards lack parent\.model\.layers\.1\.mlp\.experts"):
        RoutedForCausalLM.from_pretrained(copy)


def test_new_folder_leaves_nothing_half_written(tmp_path):
    def fail():
        with new_folder(tmp_path / "out") as folder:
            (folder / "x").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match=r"out .*exists already"), new_folder(tmp_path / "out"):
        pass
