"""Model families: known attention matches its own; unknown attention is refused by name."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import (
    Cohere2Config,
    DiffLlamaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from pregate.base.errors import UserError
from pregate.router.engine import decoder
from pregate.router.engine.attention import AttentionRules, paged_attention
from pregate.router.engine.family import check_family, tiny_config
from pregate.router.engine.kv_cache import PagedKV
from pregate.router.engine.step_layout import SequenceSlice, StepLayout

#: As Phi-3 mini 128k: 48 factors for the 96 channels of a head.
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.1] * 48, "long_factor": [4.0] * 48}
PHI3_128K = Phi3Config(max_position_embeddings=131072, original_max_position_embeddings=4096, rope_parameters=LONG_ROPE)
#: Full-size configs, as their checkpoints have them.
KNOWN = {
    "llama": LlamaConfig(),
    "mistral": MistralConfig(sliding_window=4096),
    "qwen2": Qwen2Config(),
    "qwen2 windowed": Qwen2Config(use_sliding_window=True),
    "qwen3": Qwen3Config(),
    "phi3": Phi3Config(),
    "phi3 128k": PHI3_128K,
    "gemma2": Gemma2Config(),
    "gemma3": Gemma3TextConfig(),
    "granite": GraniteConfig(attention_multiplier=0.2, residual_multiplier=0.22, logits_scaling=8.0),
    "olmo2": Olmo2Config(),
    "cohere2": Cohere2Config(),
    "smollm3": SmolLM3Config(),
}


#: Families with a part that a lean decoder does not know: they run in transformers' modules.
NOT_LEAN = {"granite", "olmo2", "cohere2", "smollm3"}


@pytest.mark.parametrize("name", KNOWN)
def test_known_families_pass(name):
    assert check_family(KNOWN[name]) == (name not in NOT_LEAN)


def test_a_family_whose_lean_decoder_would_differ_runs_as_it_is(monkeypatch):
    monkeypatch.setattr(decoder, "_signed", lambda cos, sin: (torch.ones_like(cos[0, :, None]), sin[0, :, None] * 0))
    assert not check_family(LlamaConfig())


@pytest.mark.parametrize("config", [DiffLlamaConfig(), GptOssConfig()], ids=lambda c: c.model_type)
def test_unknown_attention_is_refused_by_name(config):
    with pytest.raises(UserError, match=config.model_type):
        check_family(config)


@pytest.mark.parametrize(
    ("family", "field", "wrong"),
    [("mistral", "sliding_window", None), ("gemma2", "softcap", None), ("granite", "scaling", 1)],
)
def test_the_check_sees_a_rule_that_is_not_honoured(family, field, wrong, monkeypatch):
    of = AttentionRules.of
    monkeypatch.setattr(AttentionRules, "of", lambda *args, **kwargs: replace(of(*args, **kwargs), **{field: wrong}))
    with pytest.raises(UserError, match=family):
        check_family(KNOWN[family])


def test_the_check_sees_logits_of_other_rows_than_were_asked_for(monkeypatch):
    original = LlamaForCausalLM.forward

    def all_rows(self, *args, logits_to_keep=0, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", all_rows)
    with pytest.raises(UserError, match="llama"):
        check_family(LlamaConfig())


def test_tiny_config_keeps_the_switches():
    tiny = tiny_config(Gemma2Config())
    assert tiny.sliding_window == 8
    assert tiny.attn_logit_softcapping == Gemma2Config().attn_logit_softcapping
    assert len(set(tiny.layer_types)) == 2


def test_tiny_config_keeps_one_layer_of_each_kind():
    """SmolLM3 leaves out rotary positions in every fourth layer; all its layers attend fully."""
    tiny = tiny_config(SmolLM3Config())
    assert (tiny.no_rope_layers, tiny.layer_types) == ([1, 0], ["full_attention"] * 2)
    assert tiny.num_hidden_layers == 2


def test_tiny_config_keeps_how_far_positions_are_stretched():
    full = copy.deepcopy(PHI3_128K.rope_parameters)
    tiny = tiny_config(PHI3_128K)
    assert tiny.max_position_embeddings / tiny.original_max_position_embeddings == 32
    assert tiny.rope_parameters["short_factor"] == [1.1] * 4
    assert PHI3_128K.rope_parameters == full, "the model's own config is left as it was"


def test_arguments_that_are_set_and_unknown_are_refused():
    layout = StepLayout.build(PagedKV(1, 4, [((1, 4), (1, 4))]), [SequenceSlice([0], 0, 2)])
    x = torch.zeros(1, 1, 2, 4)
    module = torch.nn.Module()
    with pytest.raises(UserError, match="sinks"):
        paged_attention(module, x, x, x, None, scaling=1.0, pregate_step=layout, sinks=torch.ones(1))
