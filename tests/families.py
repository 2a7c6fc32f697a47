"""Tiny random models of the families that convert, each with the switches its real checkpoints set."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Exaone4Config,
    ExaoneConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GlmConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.paths.decouple import DecoupleOptions, decouple

WINDOW = 12
SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
)
_SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
_LOCAL_AND_GLOBAL_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [3.0, 9.0],
}


def _tiny(make: Callable[..., PretrainedConfig], **switches: Any) -> PretrainedConfig:
    return make(**{**SIZES, **switches})


#: Name of a case -> config.
FAMILIES: Mapping[str, PretrainedConfig] = MappingProxyType(
    {
        "llama": _tiny(LlamaConfig, attention_bias=True, rope_parameters=_LLAMA3_ROPE),
        "llama tied": _tiny(LlamaConfig, tie_word_embeddings=True, num_key_value_heads=4),
        "mistral": _tiny(MistralConfig, sliding_window=WINDOW),
        "qwen2": _tiny(Qwen2Config, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        "qwen3": _tiny(Qwen3Config, tie_word_embeddings=True),
        "phi3": _tiny(Phi3Config, sliding_window=WINDOW),
        "phi3 longrope": _tiny(Phi3Config, original_max_position_embeddings=128, rope_parameters=_LONG_ROPE),
        "gemma": _tiny(GemmaConfig, num_key_value_heads=1),
        "gemma2": _tiny(
            Gemma2Config,
            sliding_window=WINDOW,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=4.0,
            final_logit_softcapping=5.0,
        ),
        "gemma3": _tiny(
            Gemma3TextConfig,
            num_hidden_layers=3,
            sliding_window=WINDOW,
            query_pre_attn_scalar=16,
            layer_types=["sliding_attention", *_SLIDING_THEN_FULL],
            rope_parameters=_LOCAL_AND_GLOBAL_ROPE,
        ),
        "granitemoehybrid": _tiny(  # Granite 4 without experts is dense; its config holds an infinity
            GraniteMoeHybridConfig,
            num_local_experts=0,
            shared_intermediate_size=64,
            layer_types=["attention", "attention"],
            mamba_n_heads=8,
            mamba_d_head=8,
        ),
        "granite": _tiny(
            GraniteConfig,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            attention_multiplier=0.2,
            logits_scaling=2.0,
            tie_word_embeddings=True,
        ),
        "olmo2": _tiny(Olmo2Config),
        "olmo3": _tiny(Olmo3Config, sliding_window=WINDOW, layer_types=_SLIDING_THEN_FULL),
        "cohere": _tiny(CohereConfig, use_qk_norm=True, logit_scale=0.5),
        "cohere2": _tiny(Cohere2Config, sliding_window=WINDOW, layer_types=_SLIDING_THEN_FULL, logit_scale=0.5),
        "glm": _tiny(GlmConfig, attention_bias=True),
        "exaone4": _tiny(Exaone4Config, sliding_window=WINDOW, layer_types=_SLIDING_THEN_FULL),
        "smollm3": _tiny(SmolLM3Config, no_rope_layers=[1, 0]),
    }
)

#: Not converted: a Llama inside, but its tensors are stored under other names than the module's.
EXAONE = _tiny(ExaoneConfig)
#: Not converted: buffers that only its own loading fills.
FALCON_H1 = _tiny(
    FalconH1Config,
    ssm_multipliers=[0.5, 0.6, 0.7, 0.8, 0.9],
    mamba_d_ssm=64,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_d_state=8,
)


def save_random(config: PretrainedConfig, tokenizer_folder: Path, path: Path, dtype: str = "float32", **saving) -> Path:
    """Write a random model of `config` with the tokenizer of another folder; the same weights every time.

    Biases and norms are random too: at 0 and 1, where transformers starts them, they would show nothing. The last norm
    has random signs, or a tied head would say the token it is at over and over.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name == "model.norm.weight":
                parameter.data += torch.randn(parameter.shape) - 1  # Gemma adds 1 to it and starts at 0
            elif parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn(parameter.shape)
    model.to(getattr(torch, dtype)).save_pretrained(path, **saving)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, path)
    return path


def make_checkpoints(dense: Path, text: Path) -> None:
    """Convert the dense model and decouple the result, into `layerwise` and `path` beside it."""
    layerwise = dense.parent / "layerwise"
    convert(ConvertOptions(dense, layerwise, 8, 2, 3, (text,), samples=4, sequence_length=48))
    decouple(DecoupleOptions(layerwise, dense.parent / "path", (text,), steps=3, dim=16, pool_tokens=2000))
