"""Models routed by paths: saved and loaded, with learned weights, and configs that are refused."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from pregate.base.errors import UserError
from pregate.model.config import LayerCut, PathRouterConfig, RoutedConfig
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import PathRouter, choose_experts
from tests.model.random_routers import KINDS, UNLIKE, Kind, assert_same, prompt, random_router, route


def tiny_model(kind: Kind) -> RoutedForCausalLM:
    """A random model of three layers, routed by paths of a router of this kind."""
    parent = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    cuts = [asdict(c) for c in kind.cuts]
    config = RoutedConfig(parent, cuts, routing="path", selection=kind.selection, path_router=asdict(kind.config))
    model = RoutedForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.path_router = random_router(kind)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_saved_model_routes_and_computes_the_same(kind: Kind, tmp_path: Path):
    """Whole and again from a cache, padded on the left; weights are followed through."""
    model, ids = tiny_model(kind), torch.tensor([prompt(30)])
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "saved")
    again = RoutedForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert_same(route(again.path_computer, ids[0].tolist()), route(model.path_computer, ids[0].tolist()))
    torch.testing.assert_close(again(ids).logits, logits, rtol=1e-4, atol=1e-4)
    first = again(ids[:, :13], use_cache=True)
    rest = again(ids[:, 13:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), logits, rtol=1e-4, atol=1e-4)
    padded, mask = torch.cat([ids.new_full((1, 4), 9), ids], dim=1), torch.ones(1, 34, dtype=torch.int64)
    mask[:, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    shifted = again(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(shifted, logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_learned_weights_reach_the_experts(tmp_path: Path):
    model, ids = tiny_model(Kind(weights="learned")), torch.tensor([prompt(30)])
    assert model.path_router is not None
    logits = model(ids).logits
    model.path_router.scale.zero_()
    model.forget_path_computer()
    assert model.paths(ids[0].tolist()).weights is None
    assert not torch.allclose(model(ids).logits, logits, atol=1e-2)


def test_weights_by_hand_and_their_gradient():
    cuts = [LayerCut(2, 0, 1, 1), LayerCut(2, 0, 1, 1)]
    router = PathRouter(PathRouterConfig(dim=4, weights="learned"), 10, cuts)
    scores = torch.tensor([[0.0, 0.0, 0.0, 3.0**0.5]])
    with torch.no_grad():
        assert router.expert_weights(scores) is None
    weights = router.expert_weights(scores)
    assert weights is not None
    assert weights.tolist() == [[1.0] * 4]
    weights.sum().backward()
    assert router.scale.grad is not None
    expected = torch.tensor([0.5, 0.5, *torch.tensor([0.0, 3.0**0.5]).softmax(0).tolist()])
    torch.testing.assert_close(router.scale.grad, expected)
    router.scale.data += torch.tensor([1.0, 2.0, 3.0, 4.0])
    chosen = choose_experts(router.requires_grad_(False), scores)
    assert chosen.ids.tolist() == [[[0], [1]]]
    assert chosen.weights is not None
    assert chosen.weights.flatten().tolist() == pytest.approx([1.5, 1 + 4 * expected[3].item()], abs=1e-6)


def test_a_config_of_before_still_names_a_router():
    """What earlier checkpoints hold: four fields."""
    config = RoutedConfig(LlamaConfig(), path_router={"dim": 128, "num_blocks": 1, "num_heads": 4, "window": 64})
    shape = config.router_shape
    assert (shape.heads, shape.gate, shape.weights) == ("independent", "scores", "one")
    names = set(PathRouter(shape, 10, UNLIKE).state_dict())
    assert {"embedding.weight", "heads.weight", "heads.bias"} < names and "scale" not in names


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"window": 0}, "window 0: allowed: 1 or more"),
        ({"num_blocks": 0}, "blocks 0: allowed: 1 or more"),
        ({"heads": "double"}, "heads double: allowed: independent, recurrent, single"),
        ({"gate": "soft"}, "gate soft: allowed: scores, dselect"),
        ({"weights": "two"}, "weights two: allowed: one, learned"),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        PathRouterConfig(**change)


def test_one_index_for_unlike_layers_is_refused():
    with pytest.raises(UserError, match=r"heads single: .* found 2 of 7, 3 of 5 active"):
        PathRouter(PathRouterConfig(heads="single"), 10, UNLIKE)
