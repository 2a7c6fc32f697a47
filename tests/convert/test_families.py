"""Gated decoders of other families than Llama: found by shape, converted, with all experts on equal to the parent."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pregate.convert.controls import AllPolicy
from pregate.convert.conversion import convert
from pregate.convert.decouple import DecoupleOptions, decouple
from pregate.convert.options import ConvertOptions
from pregate.model import RoutedForCausalLM

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
FAMILIES = {
    "mistral": MistralConfig(**SIZES, sliding_window=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, sliding_window=16),
    "phi3": Phi3Config(**SIZES),
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_converted_and_decoupled(family: str, tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    parent: PretrainedConfig = FAMILIES[family]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(parent).save_pretrained(tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_dense / name, tmp_path / "dense" / name)
    out, path = tmp_path / "routed", tmp_path / "path"
    convert(ConvertOptions(tmp_path / "dense", out, 8, 2, 3, (tiny_text,), samples=4, sequence_length=48))
    decouple(DecoupleOptions(out, path, (tiny_text,), steps=2, dim=16))

    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()(ids).logits
    for folder in (out, path):
        model = RoutedForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert type(model.parent).__name__.lower().startswith(family)
        assert (model(ids).logits - expected).abs().max() > 1e-2
        whole = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
        assert torch.equal(whole, model.generate(ids, max_new_tokens=8, do_sample=False))
        model.routing_policy = AllPolicy()
        assert (model(ids).logits - expected).abs().max() < 1e-4
