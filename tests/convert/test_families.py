"""Gated decoders are found by shape, converted, and with all experts on equal to the parent; the rest is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Starcoder2Config,
)

from pregate.base.errors import UserError
from pregate.base.options import Dtype
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.measure.controls import AllPolicy
from pregate.model import RoutedForCausalLM
from tests.families import EXAONE, FALCON_H1, FAMILIES, SIZES, save_random


def all_on_difference(routed: RoutedForCausalLM, dense: Path) -> float:
    """Largest logit difference between the parent and the routed model with every expert on."""
    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    parent = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    routed.routing_policy = AllPolicy()
    difference = (routed(ids).logits - parent(ids).logits).abs().max().item()
    routed.routing_policy = None
    return difference


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_converted_and_decoupled(family: str, family_folder: Callable[[str], Path]):
    folder = family_folder(family)
    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    parent = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
    expected = parent(ids).logits
    for routing in ("layerwise", "path"):
        model = RoutedForCausalLM.from_pretrained(folder / routing, dtype=torch.float32).eval()
        assert type(model.parent) is type(parent)
        assert model.config.routing == routing
        assert (model(ids).logits - expected).abs().max() > 1e-2
        whole = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
        assert torch.equal(whole, model.generate(ids, max_new_tokens=8, do_sample=False))
        assert all_on_difference(model, folder / "dense") < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "llama tied"])
def test_half_precision_and_sharded_sources(
    family: str, dtype: Dtype, tiny_dense: Path, tiny_text: Path, tmp_path: Path
):
    """A sharded bf16 or fp16 folder; stored as it was, each weight keeps its value."""
    dense = save_random(FAMILIES[family], tiny_dense, tmp_path / "dense", dtype, max_shard_size="40KB")
    assert len(list(dense.glob("model-*.safetensors"))) > 1
    options = ConvertOptions(dense, tmp_path / "out", 8, 2, 3, (tiny_text,), samples=4, sequence_length=48, dtype=dtype)
    convert(options)
    model = RoutedForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert all_on_difference(model, dense) < 1e-4
    stored = stored_tensors(tmp_path / "out")
    assert {d for name, d in stored.items() if "mlp.experts" in name} == {{"bfloat16": "BF16", "float16": "F16"}[dtype]}
    tied = FAMILIES[family].tie_word_embeddings
    assert any("lm_head" in name for name in stored) == (not tied), "a tied head is stored once"


def stored_tensors(path: Path) -> dict[str, str]:
    """Name and stored type of every tensor in a folder's shards."""
    found: dict[str, str] = {}
    for shard in path.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


@torch.no_grad()
def test_an_older_gemma_config_that_names_two_activations(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    """Released Gemma 2 configs hold a stale `hidden_act` beside `hidden_activation`, which the model computes with."""
    dense = save_random(FAMILIES["gemma2"], tiny_dense, tmp_path / "dense")
    fields = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(fields | {"hidden_act": "gelu"}))
    convert(ConvertOptions(dense, tmp_path / "out", 8, 2, 3, (tiny_text,), samples=4, sequence_length=48))
    model = RoutedForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.hidden_act == "gelu_pytorch_tanh"
    assert all_on_difference(model, dense) < 1e-4


@torch.no_grad()
def test_buffers_that_no_shard_holds_are_set_on_loading(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    """Embedding scales and two kinds of rotary frequencies: loaded as a stranger's code they would be garbage."""
    dense = save_random(FAMILIES["gemma3"], tiny_dense, tmp_path / "dense")
    convert(ConvertOptions(dense, tmp_path / "out", 8, 2, 3, (tiny_text,), samples=2, sequence_length=24))
    model = RoutedForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = dict(AutoModelForCausalLM.from_pretrained(dense).named_buffers())
    assert len(expected) >= 3
    for name, buffer in model.parent.named_buffers():
        assert "mlp" in name or "feed_forward" in name or torch.equal(buffer, expected[name]), name
    assert all_on_difference(model, dense) < 1e-4


SMALL_MIXTURE = {**SIZES, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
REFUSED = {
    "starcoder2": (Starcoder2Config(**SIZES), "Starcoder2MLP"),
    "gpt_neox": (GPTNeoXConfig(**SIZES), "GPTNeoXMLP"),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=4), "is a mixture already"),
    "qwen2_moe": (Qwen2MoeConfig(**SMALL_MIXTURE, num_experts=4), "is a mixture already"),
    "llama": (LlamaConfig(**SIZES, mlp_bias=True), "LlamaMLP in layer 0: linear layers with biases"),
    "bitnet": (BitNetConfig(**SIZES), "BitNetMLP in layer 0 does not compute"),
    "exaone": (EXAONE, "its weights lack model.embed_tokens.weight"),
    "falcon_h1": (FALCON_H1, "buffer model.layers.0.mamba.mup_vector is in no checkpoint"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(family: str, tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    config: PretrainedConfig = REFUSED[family][0]
    dense = save_random(config, tiny_dense, tmp_path / "dense")
    with pytest.raises(UserError, match=REFUSED[family][1]) as caught:
        convert(ConvertOptions(dense, tmp_path / "out", 8, 2, 3, (tiny_text,), samples=4, sequence_length=48))
    assert "\n" not in str(caught.value)
    assert family in str(caught.value).lower()
    assert not (tmp_path / "out").exists()
