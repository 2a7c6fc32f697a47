"""How large a path router is where its user does not say."""

from pathlib import Path
from typing import Any

from pregate.convert.paths.options import DecoupleOptions
from pregate.convert.paths.size import LARGE, SMALL, dense_flops, sized
from pregate.model.config import LayerCut, RoutedConfig
from pregate.model.router_flops import MAX_SHARE, router_flops

#: SmolLM2-135M's shape.
REAL = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
TINY = REAL | {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "vocab_size": 200}  # fmt: skip


def config_of(text: dict[str, Any]) -> RoutedConfig:
    cut = LayerCut(5, 3, 3, text["intermediate_size"] // 8)
    return RoutedConfig(text_config=text, layer_cuts=[vars(cut)] * text["num_hidden_layers"], selection="threshold")


def options(**given: Any) -> DecoupleOptions:
    return DecoupleOptions(Path("m"), Path("o"), (Path("t"),), **given)


def test_a_real_model_gets_the_widest_router_of_one_percent():
    config = config_of(REAL)
    found = sized(options(), config)
    assert {name: getattr(found, name) for name in LARGE} == LARGE
    assert found.dim is not None
    wider = options(**LARGE, dim=found.dim + 32)
    cost, more = (router_flops(o.shape(), config.cuts, config.selection) for o in (found, wider))
    assert cost <= MAX_SHARE * dense_flops(config) < more


def test_a_tiny_model_gets_a_small_one():
    found = sized(options(), config_of(TINY))
    assert {name: getattr(found, name) for name in SMALL} == SMALL


def test_what_is_given_stays():
    given = {"dim": 64, "blocks": 3, "window": 9, "embedding": "own", "pool_tokens": 777, "steps": 5}
    for text in (REAL, TINY):
        found = sized(options(**given), config_of(text))
        assert {name: getattr(found, name) for name in given} == given


def test_operations_of_a_dense_model_are_those_of_its_parameters():
    """A tied head is multiplied by, an embedding is looked up in."""
    per_layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64
    assert dense_flops(config_of(TINY)) == 2 * (2 * per_layer + 64 + 200 * 64)
