"""Path routers of other kinds behind an engine: learned weights, held to the reference model like any deployment."""

from __future__ import annotations

from pathlib import Path

import pytest

from pregate.model.modeling import RoutedForCausalLM
from pregate.router.engine.local_exchange import LocalExchange
from tests.equality import reference_texts
from tests.router.serving import engine_in_process, hold, weigh_experts

NUM_TOKENS = 12
PROMPTS = [[1, *range(30, 30 + n * 7, 7)] for n in (5, 50, 21)]


@pytest.fixture(scope="module")
def weighted(tiny_path_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weighted") / "model"
    weigh_experts(tiny_path_checkpoint, path)
    return path


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_learned_weights_are_served_as_the_reference_computes_them(weighted: Path, num_hosts: int):
    """By one host in this process, which runs whole layers, and by two, whose rows are put together."""
    model = RoutedForCausalLM.from_pretrained(weighted).eval()
    weights = model.paths(PROMPTS[1]).weights
    assert weights is not None and weights.max() - weights[weights > 0].min() > 0.5
    references = reference_texts(model, PROMPTS, NUM_TOKENS)
    with engine_in_process(weighted, num_hosts) as engine:
        assert isinstance(engine.exchange, LocalExchange) == (num_hosts == 1)
        hold(engine, "weighted", references)
