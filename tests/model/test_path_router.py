"""Paths are the same whole, in chunks, token by token, alone and in a padded batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pregate.model import path_router
from pregate.model.config import PathRouterConfig
from pregate.model.path_computer import PathComputer, PathState
from pregate.model.path_router import PathRouter
from pregate.model.paths import Paths
from tests.model.random_routers import UNLIKE, Kind, assert_same, in_chunks, prompt, random_router, route, whole


def test_routers_under_test_tell_tokens_apart(every: PathComputer):
    """Else the equalities below would hold for nothing."""
    ids, weights = route(every, prompt(90))
    assert len(np.unique(ids, axis=0)) >= 4
    assert (weights is None) == (every.config.weights == "one")
    assert weights is None or len(np.unique(weights)) > 50


@pytest.mark.parametrize("size", [1, 7, 50])
@pytest.mark.parametrize("length", [1, 11, 90])
def test_chunks_change_nothing(every: PathComputer, length: int, size: int):
    ids = prompt(length)
    assert_same(in_chunks(every, ids, size), route(every, ids))


def test_chunks_of_the_runtime_itself_change_nothing(computer: PathComputer, monkeypatch: pytest.MonkeyPatch):
    import pregate.model.path_router as module

    ids = prompt(90)
    before = whole(computer, ids)
    monkeypatch.setattr(module, "CHUNK_TOKENS", 13)
    assert np.array_equal(whole(computer, ids), before)


@pytest.mark.parametrize("window", [1, 12, 40])
def test_a_long_text_is_scored_in_pieces_and_trains_the_same(window: int, monkeypatch: pytest.MonkeyPatch):
    """Pieces shorter and longer than the window, after a past of another length in each row."""
    torch.manual_seed(0)
    router = PathRouter(PathRouterConfig(16, 2, 4, window), 100, UNLIKE).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    past_BN, ids_BN = (torch.tensor([prompt(n, seed) for seed in (1, 2)]) for n in (9, 90))
    past, past_len_B = router(past_BN)[1], torch.tensor([9, 4])
    sizes: list[int] = []
    router.blocks[0].register_forward_pre_hook(lambda _block, args: sizes.append(args[0].shape[1]))

    def scores_and_gradients(after: tuple[Any, ...]) -> list[torch.Tensor]:
        sizes.clear()
        scores_BNS = router(ids_BN, *after)[0]
        (scores_BNS.sin() * torch.linspace(0, 3, 90, dtype=torch.float64)[:, None]).sum().backward(retain_graph=True)
        gradients = [p.grad for p in router.parameters() if p.grad is not None]
        router.zero_grad()
        return [scores_BNS, *gradients]

    for after in ((), (past, past_len_B)):
        expected = scores_and_gradients(after)
        assert sizes == [90]
        with monkeypatch.context() as patch:
            patch.setattr(path_router, "CHUNK_TOKENS", 13)
            found = scores_and_gradients(after)
        assert sizes == [13] * 6 + [12]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_batch_mates_of_other_lengths_change_nothing(every: PathComputer):
    texts = [prompt(n, seed=n) for n in (3, 40, 17, 1)]
    states = [every.new_state() for _ in texts]
    firsts = [t[: len(t) // 2] for t in texts]
    early, states = every.extend(states, firsts)
    late, states = every.extend(states, [t[len(f) :] for t, f in zip(texts, firsts, strict=True)])
    for text, a, b in zip(texts, early, late, strict=True):
        both = Paths.concatenate([a, b])
        assert_same((both.ids, both.weights), route(every, text))


def test_paths_of_no_tokens_join_those_of_others(every: PathComputer):
    paths, _ = every.extend([every.new_state()] * 2, [prompt(5), []])
    both = Paths.concatenate(paths)
    assert_same((both.ids, both.weights), route(every, prompt(5)))


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that starts anew with every call (the released Read-ME code, by default)."""
    original = PathRouter.encode
    monkeypatch.setattr(PathRouter, "encode", lambda self, ids, past, past_len: original(self, ids, past, past_len * 0))


def see_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention to the padding before a shorter mate's past."""
    original = path_router.RouterBlock._bias
    monkeypatch.setattr(
        path_router.RouterBlock,
        "_bias",
        lambda self, new, keys, past_len: original(self, new, keys, past_len * 0 + keys),
    )


def lose_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state one token shorter than the window needs."""
    original = PathComputer._keep

    def shorter(self: PathComputer, *args: Any) -> list[PathState]:
        return [PathState(state.kept[1:], state.counts) for state in original(self, *args)]

    monkeypatch.setattr(PathComputer, "_keep", shorter)


@pytest.mark.parametrize("defect", [forget, see_padding, lose_a_token])
def test_a_router_that_pads_caches_or_chunks_wrongly_is_found_out(
    every: PathComputer, monkeypatch: pytest.MonkeyPatch, defect: Callable[[pytest.MonkeyPatch], None]
):
    """Texts of unlike length at once, in three calls: what the tests above compare is then no longer the same."""
    texts = [prompt(n, seed=n) for n in (*range(6, 24), 60, 70, 80, 90)]
    right = [route(every, text)[0] for text in texts]
    defect(monkeypatch)
    states, parts = [every.new_state()] * len(texts), []
    for third in range(3):
        pieces = [t[len(t) * third // 3 : len(t) * (third + 1) // 3] for t in texts]
        paths, states = every.extend(states, pieces)
        parts.append(paths)
    wrong = [Paths.concatenate(p).ids for p in zip(*parts, strict=True)]
    assert any(not np.array_equal(a, b) for a, b in zip(right, wrong, strict=True))


def test_routing_is_causal(every: PathComputer):
    ids = prompt(40)
    changed = [*ids[:25], *prompt(15, seed=9)]
    assert np.array_equal(whole(every, ids)[:25], whole(every, changed)[:25])
    assert not np.array_equal(whole(every, ids), whole(every, changed))


def test_state_is_bounded_by_the_window(every: PathComputer):
    """The last 11 tokens of each block and nothing else, however long the text and however it comes."""
    state = every.new_state()
    for size in (1, 3, 90, 1, 200):
        _, (state,) = every.extend([state], [prompt(size)])
        assert state.length <= every.config.window - 1
        assert state.kept.untyped_storage().nbytes() <= 2 * 2 * 11 * 16 * 8
    assert state.kept.shape == (11, 4, 16)


def test_paths_fit_their_layers(every: PathComputer):
    paths = every.extend([every.new_state()], [prompt(30)])[0][0]
    paths.check(every.cuts)
    assert (paths.ids[:, 1] == -1).all()
    for layer, cut in enumerate(every.cuts):
        sizes = set((paths.ids[:, layer] >= 0).sum(axis=-1).tolist())
        assert sizes == {cut.num_active} or (every.router.selection == "threshold" and max(sizes) <= cut.num_routed)
    if every.config.heads == "single":
        assert np.array_equal(paths.ids[:, 0], paths.ids[:, 2])


def test_ties_go_to_the_lower_id_in_every_batch_shape():
    router: Any = random_router(Kind())
    with torch.no_grad():
        router.heads.weight[3] = router.heads.weight[1]  # experts 1 and 3 of layer 0 tie in exact arithmetic
        router.heads.bias[3] = router.heads.bias[1]
    computer, ids = PathComputer(router), prompt(60, seed=4)
    one = whole(computer, ids)[:, 0]
    assert np.array_equal(in_chunks(computer, ids, 1)[0][:, 0], one)
    has_3 = (one == 3).any(axis=-1)
    assert has_3.any()
    assert (one[has_3] == 1).any(axis=-1).all()
