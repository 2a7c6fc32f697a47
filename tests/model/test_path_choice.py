"""Experts are chosen of all sequences and layers at once, as each by itself would choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pregate.kernels.reference import above, top_k
from pregate.model import path_computer
from pregate.model.config import LayerCut, PathRouterConfig
from pregate.model.gates import Choice
from pregate.model.path_computer import PathComputer
from pregate.model.path_router import PathRouter, choose_experts, split_layers
from tests.model.random_routers import Kind, prompt, random_router


class _Calls(TorchDispatchMode):
    """Counts torch's operations."""

    num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += 1
        return func(*args, **(kwargs or {}))


def calls_of_a_step(kind: Kind, num_sequences: int, num_layers: int) -> int:
    """How many operations extend so many sequences of unlike length by a token each."""
    router = PathRouter(
        kind.config, 100, [LayerCut(6, 2, 2, 8), LayerCut(4, 4, 1, 8)] * (num_layers // 2), kind.selection
    )
    computer = PathComputer(router)
    texts = [prompt(3 + n % 20, seed=n) for n in range(num_sequences)]
    states = computer.extend([computer.new_state()] * num_sequences, texts)[1]
    with _Calls() as calls:
        computer.extend(states, [[n % 100] for n in range(num_sequences)])
    return calls.num_calls


@pytest.mark.parametrize("weights", ["one", "learned"])
@pytest.mark.parametrize(("selection", "held"), [("top_k", False), ("threshold", False), ("threshold", True)])
def test_a_decode_step_takes_the_same_calls_whatever_its_sequences_and_layers(selection: str, held: bool, weights: str):
    kind = Kind(selection=selection, weights=weights, hold_share=held)
    assert calls_of_a_step(kind, 2, 2) == calls_of_a_step(kind, 33, 2) == calls_of_a_step(kind, 33, 16)


@pytest.mark.parametrize("selection", ["top_k", "threshold"])
def test_all_layers_at_once_choose_as_each_by_itself(selection: str):
    """Of unlike layers, with many ties; thresholds that every, some and no scores reach."""
    cuts = [
        LayerCut(7, 1, 3, 8),
        LayerCut(0, 8, 0, 8),
        LayerCut(4, 1, 0, 8),
        LayerCut(2, 1, 2, 8),
        LayerCut(64, 1, 9, 8),
    ]
    router = PathRouter(PathRouterConfig(dim=4), 10, cuts, selection)
    router.thresholds.copy_(torch.tensor([-torch.inf, torch.inf, 0.0, torch.inf, 1.0]))
    scores_NS = torch.randint(-3, 4, (50, 77), generator=torch.Generator().manual_seed(0)).double()
    ids_NLK = choose_experts(router, scores_NS).ids
    for layer, (cut, scores) in enumerate(zip(cuts, split_layers(scores_NS, cuts), strict=True)):
        expected = (
            above(scores, router.thresholds[layer]) if selection == "threshold" else top_k(scores, cut.num_active)
        )
        expected = expected if cut.num_active else expected[:, :0]
        width = expected.shape[1]
        assert torch.equal(ids_NLK[:, layer, :width], expected)
        assert (ids_NLK[:, layer, width:] == -1).all()


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """For each time experts are chosen: of how many tokens, and on which device their scores lie."""
    seen: list[tuple[int, str]] = []
    original = path_computer.choose_experts

    def choose(router: PathRouter, scores_NS: torch.Tensor, offset_N: torch.Tensor | None) -> Choice:
        seen.append((len(scores_NS), scores_NS.device.type))
        if scores_NS.device.type == "cpu":
            return original(router, scores_NS, offset_N)
        return Choice(torch.empty(0, len(router.cuts), 0, dtype=torch.int64))

    monkeypatch.setattr(path_computer, "choose_experts", choose)
    return seen


def test_experts_are_chosen_once_a_call_and_of_no_tokens_only_where_there_are_none(
    computer: PathComputer, scored: list[tuple[int, str]]
):
    states = computer.extend([computer.new_state()] * 2, [prompt(3), prompt(1)])[1]
    assert scored == [(4, "cpu")]
    scored.clear()
    paths, _ = computer.extend(states, [prompt(1), []])
    assert scored == [(1, "cpu"), (0, "cpu")]
    assert [p.num_tokens for p in paths] == [1, 0]


def test_scores_of_no_tokens_lie_where_thresholds_and_scale_do(scored: list[tuple[int, str]]):
    elsewhere = PathComputer(random_router(Kind(weights="learned", selection="threshold")).to("meta"))
    (paths,), _ = elsewhere.extend([elsewhere.new_state()], [[]])
    assert scored == [(0, "meta")]
    assert paths.num_tokens == 0
