"""Model families: known attention matches its own; unknown attention is refused by name."""

import pytest
import torch
from transformers import (
    DiffLlamaConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from pregate.base.errors import UserError
from pregate.router.attention import StepLayout, paged_attention
from pregate.router.family import check_family, tiny_config
from pregate.router.kv_cache import PagedKV

KNOWN = [LlamaConfig(), MistralConfig(sliding_window=4096), Qwen2Config(), Qwen3Config(), Phi3Config(), Gemma2Config()]


@pytest.mark.parametrize("config", KNOWN, ids=lambda c: c.model_type)
def test_known_families_pass(config):
    check_family(config)


@pytest.mark.parametrize("config", [DiffLlamaConfig(), GptOssConfig()], ids=lambda c: c.model_type)
def test_unknown_attention_is_refused_by_name(config):
    with pytest.raises(UserError, match=config.model_type):
        check_family(config)


def test_the_check_sees_a_window_that_is_not_honoured(monkeypatch):
    from pregate.router import attention

    monkeypatch.setattr(attention._Rules, "visible", lambda self, distance: distance >= 0)
    with pytest.raises(UserError, match="mistral"):
        check_family(MistralConfig(sliding_window=4096))


def test_tiny_config_keeps_the_switches():
    tiny = tiny_config(Gemma2Config())
    assert tiny.sliding_window == 8
    assert tiny.attn_logit_softcapping == Gemma2Config().attn_logit_softcapping
    assert len(set(tiny.layer_types)) == 2


def test_arguments_that_are_set_and_unknown_are_refused():
    layout = StepLayout.build(PagedKV(4), [], [(2, torch.arange(2).numpy())])
    x = torch.zeros(1, 1, 2, 4)
    module = torch.nn.Module()
    with pytest.raises(UserError, match="sinks"):
        paged_attention(module, x, x, x, None, scaling=1.0, pregate_step=layout, sinks=torch.ones(1))
