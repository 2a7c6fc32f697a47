"""Paths known after some layers behind an engine: held to the reference model like any deployment."""

from __future__ import annotations

from pathlib import Path

import pytest

from pregate.model.modeling import RoutedForCausalLM
from pregate.router.engine.local_exchange import LocalExchange
from tests.equality import ReferenceText, reference_texts
from tests.router.serving import engine_in_process, hold

PROMPTS = [[1, *range(30, 30 + n * 7, 7)] for n in (5, 50, 21)]


@pytest.fixture(scope="module")
def references(tiny_read_checkpoint: Path) -> list[ReferenceText]:
    return reference_texts(RoutedForCausalLM.from_pretrained(tiny_read_checkpoint).eval(), PROMPTS, 12)


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_texts_are_the_references(tiny_read_checkpoint: Path, references: list[ReferenceText], num_hosts: int):
    """By one host in this process, which runs whole layers, and by two, whose rows are put together."""
    with engine_in_process(tiny_read_checkpoint, num_hosts) as engine:
        assert isinstance(engine.exchange, LocalExchange) == (num_hosts == 1)
        assert engine.info()["routing"] == "layerwise" and not engine.info()["has_path_router"]
        tally = hold(engine, f"{num_hosts} hosts", references)
        assert tally.compared == 2 * 3 * 12
