"""Path routers of other kinds behind an engine: learned weights, held to the reference model like any deployment."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from pregate.model.config import RoutedConfig
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import PathRouter
from tests.equality import Tally, reference_text, refuse_degenerate
from tests.router.serving import compare, engine_in_process, serve

NUM_TOKENS = 12
PROMPTS = [[1, *range(30, 30 + n * 7, 7)] for n in (5, 50, 21)]


@pytest.fixture(scope="module")
def weighted(tiny_path_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with paths, its experts weighed between about 0.3 and 2.5."""
    path = tmp_path_factory.mktemp("weighted") / "model"
    model = RoutedForCausalLM.from_pretrained(tiny_path_checkpoint).eval()
    assert model.path_router is not None
    shape = replace(model.config.router_shape, weights="learned")
    router = PathRouter(shape, 512, model.config.cuts, model.config.selection)
    router.load_state_dict(model.path_router.state_dict() | {"scale": torch.randn(18).sub(0.2).mul(5)})
    model.path_router = router
    model.config = RoutedConfig.from_dict(model.config.to_dict() | {"path_router": asdict(shape)})
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_path_checkpoint).save_pretrained(path)
    return path


def test_learned_weights_are_served_as_the_reference_computes_them(weighted: Path):
    model = RoutedForCausalLM.from_pretrained(weighted).eval()
    weights = model.paths(PROMPTS[1]).weights
    assert weights is not None and weights.max() - weights[weights > 0].min() > 0.5
    references = [reference_text(model, p, NUM_TOKENS) for p in PROMPTS]
    refuse_degenerate(references)
    with engine_in_process(weighted, 2) as (engine, _):
        tally = Tally()
        for together in (False, True):
            compare(tally, "weighted", references, serve(engine, PROMPTS, NUM_TOKENS, together=together))
        tally.check()
