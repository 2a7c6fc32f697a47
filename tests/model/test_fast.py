"""The fast path in the in-process model: the same answers, and absent unless asked for."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pregate.base.errors import UserError
from pregate.kernels import reference
from pregate.model.gates import Choice
from pregate.model.layers import PathPolicy
from pregate.model.modeling import RoutedForCausalLM

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["layerwise", "path"])
def checkpoint(request, tiny_layerwise_checkpoint, tiny_path_checkpoint):
    return tiny_path_checkpoint if request.param == "path" else tiny_layerwise_checkpoint


def prompt() -> torch.Tensor:
    return torch.randint(3, 512, (2, 17), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", ["fast", "loop", "grouped", "packed"])
def test_the_fast_path_gives_the_reference_s_logits(checkpoint, name):
    reference = RoutedForCausalLM.from_pretrained(checkpoint).eval()
    fast = RoutedForCausalLM.from_pretrained(checkpoint, experts_implementation=name).eval()
    with torch.no_grad():
        wanted = reference(prompt()).logits
        got = fast(prompt()).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    assert name in (fast._fast.name, "fast")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(fast.generate(prompt(), **options), reference.generate(prompt(), **options))


def test_it_can_be_switched(checkpoint):
    model = RoutedForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        wanted = model(prompt()).logits
        model.set_experts_implementation("loop")
        torch.testing.assert_close(model(prompt()).logits, wanted, rtol=0, atol=1e-4)
        first = model._fast
        model(prompt())
        assert model._fast is first, "made once"
        model.set_experts_implementation("eager")
        assert torch.equal(model(prompt()).logits, wanted)
    assert model._fast is None


def test_an_override_of_the_routing_is_followed(tiny_layerwise_checkpoint):
    class Nothing:
        def choose(self, mlp, x_TD):
            return Choice(torch.full((x_TD.shape[0], 1), -1))

    model = RoutedForCausalLM.from_pretrained(tiny_layerwise_checkpoint).eval()
    model.routing_policy = Nothing()
    with torch.no_grad():
        wanted = model(prompt()).logits
        model.set_experts_implementation("fast")
        torch.testing.assert_close(model(prompt()).logits, wanted, rtol=0, atol=1e-4)


def test_an_unknown_name_is_refused(tiny_layerwise_checkpoint):
    model = RoutedForCausalLM.from_pretrained(tiny_layerwise_checkpoint, experts_implementation="quick").eval()
    with pytest.raises(UserError, match="quick: unknown; allowed: auto, packed"):
        model(prompt())


def test_training_is_refused(tiny_layerwise_checkpoint):
    """The experts would get no gradient and nobody would notice."""
    model = RoutedForCausalLM.from_pretrained(tiny_layerwise_checkpoint, experts_implementation="loop").train()
    with pytest.raises(UserError, match="experts_implementation loop: gives experts no gradients"):
        model(prompt())
    with torch.no_grad():
        model(prompt())
    model.set_experts_implementation("eager")
    model(prompt())


def test_the_reference_loads_no_fast_kernel(tiny_layerwise_checkpoint):
    """In a process of its own, forward pass included; asking for the fast path does load them."""
    code = f"""
import sys, torch
from pregate.model.modeling import RoutedForCausalLM
def loaded():
    return {{m for m in sys.modules if m.startswith("pregate.kernels.") or m == "pregate.model.fast"}}
model = RoutedForCausalLM.from_pretrained({str(tiny_layerwise_checkpoint)!r})
model(torch.tensor([[5, 6, 7]]))
assert loaded() == {{"pregate.kernels.reference"}}, loaded()
model.set_experts_implementation("loop")
model(torch.tensor([[5, 6, 7]]))
assert {{"pregate.kernels.segments", "pregate.model.fast"}} <= loaded(), loaded()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("name", ["grouped", "packed"])
def test_a_cpu_without_bfloat16_computes_experts_in_float32(tiny_layerwise_checkpoint, name, monkeypatch):
    """The model stays in bfloat16; its experts answer what fp32 products of its weights give."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    model = RoutedForCausalLM.from_pretrained(
        tiny_layerwise_checkpoint, dtype=torch.bfloat16, experts_implementation=name
    ).eval()
    with torch.no_grad():
        assert model(prompt()).logits.dtype == torch.bfloat16
    mlp = next(mlp for mlp in model.routed_mlps if mlp.experts is not None)
    x_TD = torch.randn(5, mlp.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids_TK = torch.tensor([[0], [1], [0], [1], [0]])
    mlp.policy = PathPolicy(ids_TK[:, None].expand(-1, mlp.layer + 1, -1))
    with torch.no_grad():
        got = model._fast.forward(mlp, x_TD)
        wide = mlp.float()
        x_TD, stacks = x_TD.float(), (wide.experts.gate_up_proj, wide.experts.down_proj)
        act = reference.activation(mlp.act_name)
        wanted = reference.add_routed(wide.shared_output(x_TD), x_TD, ids_TK, None, *stacks, act)
    assert got.dtype == torch.bfloat16
    # Products in another order may round a value to its neighbour; bfloat16 products would do so to most.
    assert (got == wanted.bfloat16()).float().mean() > 0.98
