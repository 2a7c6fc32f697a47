"""Gated FFNs are found by shape and checked by what they compute; anything else is refused by name."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GraniteMoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from pregate.base.errors import UserError
from pregate.model.gated_mlp import find_gated_mlps
from pregate.router.engine.family import tiny_config

GATED = [LlamaConfig(), MistralConfig(), Qwen2Config(), Qwen3Config(), Phi3Config(), Gemma2Config()]


@pytest.mark.parametrize("config", GATED, ids=lambda c: c.model_type)
def test_gated_families_are_found_and_compute_what_we_think(config):
    tiny = tiny_config(config)
    model = AutoModelForCausalLM.from_config(tiny, dtype=torch.float32)
    found = find_gated_mlps(model)
    assert len(found) == tiny.num_hidden_layers
    for mlp in found:
        assert (mlp.attribute, mlp.width, mlp.hidden_size) == ("mlp", 48, 32)
        mlp.check(getattr(tiny, "hidden_act", None) or tiny.hidden_activation)


def test_an_ffn_that_is_not_gated_is_refused_by_name():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64))
    with pytest.raises(UserError, match="GPT2MLP"):
        find_gated_mlps(model)


@pytest.mark.parametrize("config", [MixtralConfig(), GraniteMoeConfig()], ids=lambda c: c.model_type)
def test_a_mixture_is_refused_by_name_as_one(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=rf"'{config.model_type}'.*experts is a \w+Experts.*mixture already"):
        find_gated_mlps(model)


def test_experts_in_a_list_are_a_mixture_too():
    layer, model = nn.Module(), nn.Module()
    layer.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    model.layers = nn.ModuleList([layer])
    with pytest.raises(UserError, match=r"layers\.0\.experts is a ModuleList.*mixture already"):
        find_gated_mlps(model)


def test_a_model_of_more_than_text_is_refused_by_name():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Gemma3Config())
    with pytest.raises(UserError, match=r"'gemma3'.*text"):
        find_gated_mlps(model)


def test_linear_layers_with_biases_are_refused():
    model = AutoModelForCausalLM.from_config(tiny_config(LlamaConfig(mlp_bias=True)))
    with pytest.raises(UserError, match="biases"):
        find_gated_mlps(model)


def test_the_right_shape_with_another_formula_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 24, bias=False)
            self.down_proj = nn.Linear(24, 8, bias=False)

        def forward(self, x):
            return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))

    layer = nn.Module()
    layer.mlp = Odd()
    model = nn.Module()
    model.layers = nn.ModuleList([layer])
    (found,) = find_gated_mlps(model)
    with pytest.raises(UserError, match="Odd in layer 0"):
        found.check("silu")


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_the_two_forms_of_gelu_are_told_apart(std):
    """They differ by a few millionths of the output where the gate's inputs are small; that must not pass."""
    config = tiny_config(LlamaConfig(hidden_act="gelu", initializer_range=std))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = find_gated_mlps(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    for mlp in found:
        mlp.check("gelu")
        with pytest.raises(UserError, match="gelu_pytorch_tanh"):
            mlp.check("gelu_pytorch_tanh")


def test_a_square_ffn_goes_by_names():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.w_up, self.w_gate, self.w_down = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x):
            return self.w_down(nn.functional.silu(self.w_gate(x)) * self.w_up(x))

    layer = nn.Module()
    layer.feed_forward = Square()
    model = nn.Module()
    model.layers = nn.ModuleList([layer])
    (found,) = find_gated_mlps(model)
    found.check("silu")
