"""Paths known after some layers behind an engine: held to the reference model like any deployment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pregate.model.config import LayerCut
from pregate.model.modeling import RoutedForCausalLM
from pregate.router.engine.local_exchange import LocalExchange
from pregate.router.engine.lookahead import rest_of_step
from tests.equality import ReferenceText, reference_texts
from tests.router.engine.test_tiers_equality import tiered
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


@pytest.mark.parametrize(("num_hosts", "share"), [(1, 0.75), (1, 0.4), (2, 0.5)])
def test_hosts_fetch_ahead_what_the_network_names(
    tiny_read_checkpoint: Path, references: list[ReferenceText], num_hosts: int, share: float
):
    """Whole layers, and rows that are sent; without the network, gates let nothing be fetched."""
    with tiered(tiny_read_checkpoint, num_hosts, share) as (engine, _, hosts):
        assert isinstance(engine.exchange, LocalExchange) == (share == 0.75)
        hold(engine, f"{num_hosts} hosts, {share} resident", references)
        assert all(host.status()["prefetched_bytes"] > 0 for host in hosts)


def test_the_rest_of_a_step_is_what_its_layers_will_ask_for():
    cuts = (LayerCut(3, 0, 1, 1), LayerCut(0, 1, 0, 3), LayerCut(2, 0, 1, 1))
    expected = rest_of_step(7, {2: np.array([[1, -1], [1, -1]])}, cuts)
    expected.check(3, 3)
    assert expected.step == 7 and not expected.likely_LR.any()
    assert expected.known_HLR.tolist() == [[[False] * 3, [False] * 3, [False, True, False]]]
