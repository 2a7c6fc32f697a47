"""What no model can be built of, or measured with, is refused in one sentence before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pregate.base.errors import UserError
from pregate.convert.files.dense import dense_config, load_dense
from pregate.convert.files.skeleton import Skeleton
from pregate.model.folder import read_folder


@pytest.fixture
def folder(tiny_dense: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_dense, tmp_path / "dense")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_act": "nosuch"}, "hidden_act is 'nosuch'; allowed: an activation of transformers"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None}, "hidden_size|hidden size"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_attention_heads is 4; allowed: a multiple of"),
        ({"model_type": "nosuch"}, "does not know model_type 'nosuch'"),
        ({"rope_parameters": {"rope_type": "nosuch"}}, ""),
        ({"attention_dropout": "much"}, "attention_dropout"),
        ({"layer_types": 7}, "layer_types"),
    ],
)
def test_a_config_of_no_model_is_refused(changes: dict[str, Any], sentence: str, folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=rf"^model {folder}: .*({sentence})[^\n]*$"):
        Skeleton(read_folder(folder), torch.device("cpu"))


def test_what_a_machine_left_builds_the_same_model(folder: Path):
    before = dense_config(read_folder(folder)).to_dict()
    config = json.loads((folder / "config.json").read_text())
    left = {"_attn_implementation": "flash_attention_2", "return_dict": False, "pad_token_id": 512}
    (folder / "config.json").write_text(json.dumps(config | left | {"quantization_config": {"quant_method": "fp8"}}))
    model = load_dense(read_folder(folder))
    beside = dict.fromkeys(("pad_token_id", "dtype", "_name_or_path"))
    assert model.config.to_dict() | beside == before | beside
    assert model(torch.tensor([[1, 5]])).logits.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value: float, folder: Path):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sentence = f"^model {folder}: its weights are damaged: {name} holds NaN or infinite values$"
    with pytest.raises(UserError, match=sentence):
        load_dense(read_folder(folder))
    skeleton = Skeleton(read_folder(folder), torch.device("cpu"))
    with pytest.raises(UserError, match=sentence), skeleton.loaded(skeleton.layer_names(1)):
        pass
