"""What a routed checkpoint's config says of its parent."""

import pytest
from transformers import Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config

from pregate.base.errors import UserError
from pregate.model.config import RoutedConfig

LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48, "factor": 32.0}


def test_the_context_is_the_parents():
    assert RoutedConfig(LlamaConfig(max_position_embeddings=512)).context_tokens == 512


def test_longrope_ends_the_context_where_the_long_factors_begin():
    parent = Phi3Config(
        max_position_embeddings=131072, original_max_position_embeddings=4096, rope_parameters=LONG_ROPE
    )
    assert RoutedConfig(parent).context_tokens == 4096
    by_kind = {"sliding_attention": {"rope_type": "default"}, "full_attention": LONG_ROPE}
    parent = Gemma3TextConfig(max_position_embeddings=8192, rope_parameters=by_kind)
    parent.rope_parameters["full_attention"]["original_max_position_embeddings"] = 2048
    assert RoutedConfig(parent).context_tokens == 2048


def test_the_activation_is_the_one_the_parent_computes_with():
    assert RoutedConfig(LlamaConfig(hidden_act="gelu")).hidden_act == "gelu"
    parent = Gemma2Config()
    parent.hidden_act = "gelu"  # stale in released configs
    assert RoutedConfig(parent).hidden_act == "gelu_pytorch_tanh"


def test_a_parent_without_an_activation_is_refused_by_name():
    with pytest.raises(UserError, match=r"'gpt2'.*hidden_act"):
        _ = RoutedConfig(GPT2Config()).hidden_act
