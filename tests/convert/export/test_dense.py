"""The dense parent comes back, bit for bit where the checkpoint holds all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from pregate.base.errors import UserError
from pregate.convert.export.dense import undo_cut
from pregate.convert.export.run import ExportOptions, export
from pregate.convert.files.routed_shards import CutFFN
from pregate.model.checkpoint import read_manifest
from tests.convert.export.exporting import altered, convert_stock, stored
from tests.families import FAMILIES, save_random


def test_undo_cut_by_hand():
    """Neurons 0, 1, 2 lie as 2, 0, 1: neuron 2 shared, 0 and 1 in two experts."""
    gate_up = torch.tensor([[[20.0], [21.0]], [[0.0], [1.0]], [[10.0], [11.0]]])
    down = torch.tensor([[[22.0]], [[2.0]], [[12.0]]])
    ffn = CutFFN(torch.tensor([2, 0, 1]), (gate_up[0], down[0]), (gate_up[1:], down[1:]), None, None)
    gate, up, down = undo_cut(ffn)
    assert gate.flatten().tolist() == [0, 10, 20]
    assert up.flatten().tolist() == [1, 11, 21]
    assert down.tolist() == [[2, 12, 22]]


def check_same_model(dense: Path, out: Path) -> None:
    """Every tensor of the parent, under its name, in its type, bit for bit; and its config."""
    parent, written = stored(dense), stored(out)
    assert written.keys() == parent.keys()
    for name, tensor in parent.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (out, dense))
    for fields in (ours, theirs):
        fields.pop("_name_or_path", None)
    assert ours == theirs


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, "float32") for family in ("llama", "llama tied", "qwen2", "phi3", "gemma", "gemma3", "exaone4")]
    + [("phi3", "bfloat16"), ("llama tied", "float16")],
)
def test_dense_parent_comes_back(family: str, dtype: str, tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    """Whatever the parent is stored as, and though the conversion stores float32."""
    dense = save_random(FAMILIES[family], tiny_dense, tmp_path / "dense", dtype)
    routed = convert_stock(dense, tmp_path / "routed", tiny_text, samples=2, sequence_length=12)
    figures = export(ExportOptions(routed, tmp_path / "out", "dense"))
    check_same_model(dense, tmp_path / "out")
    assert figures["stored_as"] == dtype
    assert figures["tensors_equal"] == f"{len(stored(dense))} of {len(stored(dense))}"


@pytest.mark.parametrize(("most", "norms"), [("bfloat16", "float32"), ("float64", "bfloat16")])
def test_dense_parent_of_mixed_types_comes_back(
    most: str, norms: str, tiny_dense: Path, tiny_text: Path, tmp_path: Path
):
    """Norms that lie in another type come back in it, though the commonest type would hold their every value."""
    dense = save_random(FAMILIES["llama"], tiny_dense, tmp_path / "dense", most)
    tensors = stored(dense)
    apart = {name: tensor for name, tensor in tensors.items() if "norm" in name}
    tensors |= {name: tensor.bfloat16().to(getattr(torch, norms)) for name, tensor in apart.items()}
    tensors = {n: t.float().double() if t.dtype == torch.float64 else t for n, t in tensors.items()}
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    routed = convert_stock(dense, tmp_path / "routed", tiny_text, samples=2, sequence_length=12)
    assert read_manifest(routed).source["dtype_exceptions"] == dict.fromkeys(apart, norms)
    figures = export(ExportOptions(routed, tmp_path / "out", "dense"))
    check_same_model(dense, tmp_path / "out")
    assert figures["stored_as"] == f"{most}, {norms}"
    assert figures["tensors_equal"] == f"{len(tensors)} of {len(tensors)}"
    cast = ExportOptions(routed, tmp_path / "cast", "dense", dtype="float16")
    assert export(cast)["stored_as"] == AutoConfig.from_pretrained(tmp_path / "cast").to_dict()["dtype"] == "float16"


def test_dense_of_a_path_checkpoint(tiny_path_checkpoint: Path, tiny_dense: Path, tmp_path: Path):
    """Decoupling changes no weight; the parent's folder need not be there."""
    export(ExportOptions(tiny_path_checkpoint, tmp_path / "out", "dense"))
    check_same_model(tiny_dense, tmp_path / "out")
    source = read_manifest(tiny_path_checkpoint).source | {"path": str(tmp_path / "gone")}
    moved = altered(tiny_path_checkpoint, tmp_path / "moved", {}, {}, source=source)
    figures = export(ExportOptions(moved, tmp_path / "out2", "dense"))
    assert "not compared" in figures["parent"] and "tensors_equal" not in figures


def test_dense_in_lower_precision_says_so(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    routed = convert_stock(tiny_dense, tmp_path / "routed", tiny_text, dtype="bfloat16")
    figures = export(ExportOptions(routed, tmp_path / "out", "dense"))
    assert "the parent is stored as float32, the checkpoint as bfloat16" in figures["differing"]
    for name, tensor in stored(tiny_dense).items():
        assert torch.equal(stored(tmp_path / "out")[name], tensor.bfloat16().float()), name


def test_dense_refuses_overlap_and_tuned(stock_checkpoint: Path, tmp_path: Path):
    twice = altered(
        stock_checkpoint, tmp_path / "twice", {}, {"1.mlp.neuron_index": lambda t: t.where(t != 5, torch.tensor(4))}
    )
    with pytest.raises(UserError, match=r"format dense: layer 1 .*neuron_index is no permutation"):
        export(ExportOptions(twice, tmp_path / "out", "dense"))
    tuned = altered(stock_checkpoint, tmp_path / "tuned", {}, {}, method="cmoe+tune")
    with pytest.raises(UserError, match=r"was tuned \(cmoe\+tune\)"):
        export(ExportOptions(tuned, tmp_path / "out", "dense"))
