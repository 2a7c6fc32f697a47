"""Serving through the Triton kernels, in the interpreter: equal, compiled before the first request, without waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.kernels.programs import hindrance, run_program
from tests.router.serving import weigh_experts

PROGRAM = Path(__file__).with_name("triton_serving.py")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(hindrance()), reason=hindrance() or "can run")]


@pytest.fixture(scope="module")
def served(tiny_path_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What was seen with whole layers, with groups of two hosts, with weights; all equal the reference."""
    weighted = tmp_path_factory.mktemp("weighted") / "model"
    weigh_experts(tiny_path_checkpoint, weighted)
    return run_program(PROGRAM, tiny_path_checkpoint, weighted, interpret=True)


def kernels(variants: list[str]) -> set[str]:
    return {variant.split()[0].removesuffix("_kernel") for variant in variants}


def test_whole_layers_use_every_kernel_and_groups_two(served):
    whole, groups, weighted, _ = served
    assert weighted["whole"]
    assert whole["whole"] and not groups["whole"]
    assert whole["compared"] == groups["compared"] > 0
    assert kernels(whole["serving"]) == {"segments", "gate_up", "down", "sum", "decode_gate_up", "decode_down"}
    assert kernels(groups["serving"]) == {"gate_up", "down"}


def test_every_variant_was_launched_before_the_first_request(served):
    for one in served[:3]:
        assert set(one["serving"]) <= set(one["at_start"])


def test_groups_go_by_what_was_prepared_with_the_plan(served):
    for host in served[1]["hosts"]:
        assert host["num_prepared"] == host["num_groups"] > 0


def test_from_the_first_layer_to_the_last_nobody_waits_for_a_value(served):
    assert served[0]["waits"] == []


def test_captured_steps_are_replayed_and_wait_for_nothing(served):
    """Equality is held by the program: what a capture froze, of this step's sizes or values, would show in the next."""
    weighted = served[2]
    assert weighted["waits"] == []
    assert weighted["replays"] > weighted["captures"] > 1


def test_layers_that_would_differ_from_the_groups_are_not_offered(served):
    assert served[3] == {
        "triton-int8": "triton-int8: it would round the shared experts too",
        "id -2": "expert ids must lie in [-1, 4)",
        "id 4": "expert ids must lie in [-1, 4)",
    }
