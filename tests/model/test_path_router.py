"""Paths are the same whole, in chunks, token by token, alone and in a padded batch."""

import numpy as np
import pytest
import torch

from pregate.model.config import LayerCut, PathRouterConfig
from pregate.model.path_router import PathComputer, PathRouter

CUTS = [LayerCut(5, 3, 3, 8), LayerCut(0, 1, 0, 8), LayerCut(7, 1, 2, 8)]


@pytest.fixture(scope="module")
def computer():
    torch.manual_seed(0)
    router = PathRouter(PathRouterConfig(dim=16, num_blocks=2, num_heads=4, window=12), 100, CUTS)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return PathComputer(router)


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, 100, size=length).tolist()


def whole(computer, ids):
    return computer.extend([computer.new_state()], [ids])[0][0].ids


def in_chunks(computer, ids, size):
    state, parts = computer.new_state(), []
    for start in range(0, len(ids), size):
        (paths,), (state,) = computer.extend([state], [ids[start : start + size]])
        parts.append(paths.ids)
    return np.concatenate(parts)


@pytest.mark.parametrize("size", [1, 7, 50])
@pytest.mark.parametrize("length", [1, 11, 90])
def test_chunks_change_nothing(computer, length, size):
    ids = prompt(length)
    assert np.array_equal(in_chunks(computer, ids, size), whole(computer, ids))


def test_chunks_of_the_runtime_itself_change_nothing(computer, monkeypatch):
    import pregate.model.path_router as module

    ids = prompt(90)
    before = whole(computer, ids)
    monkeypatch.setattr(module, "CHUNK_TOKENS", 13)
    assert np.array_equal(whole(computer, ids), before)


def test_batch_mates_of_other_lengths_change_nothing(computer):
    texts = [prompt(n, seed=n) for n in (3, 40, 17, 1)]
    states = [computer.new_state() for _ in texts]
    firsts = [t[: len(t) // 2] for t in texts]
    early, states = computer.extend(states, firsts)
    late, states = computer.extend(states, [t[len(f) :] for t, f in zip(texts, firsts, strict=True)])
    for text, a, b in zip(texts, early, late, strict=True):
        assert np.array_equal(np.concatenate([a.ids, b.ids]), whole(computer, text))


def test_routing_is_causal(computer):
    ids = prompt(40)
    changed = [*ids[:25], *prompt(15, seed=9)]
    assert np.array_equal(whole(computer, ids)[:25], whole(computer, changed)[:25])
    assert not np.array_equal(whole(computer, ids), whole(computer, changed))


def test_state_is_bounded_by_the_window(computer):
    _, (state,) = computer.extend([computer.new_state()], [prompt(90)])
    assert state.keys.shape == (2, 11, 16)


def test_paths_fit_their_layers(computer):
    paths = computer.extend([computer.new_state()], [prompt(30)])[0][0]
    paths.check(CUTS)
    assert (paths.ids[:, 0] >= 0).sum(axis=-1).tolist() == [3] * 30
    assert (paths.ids[:, 1] == -1).all()
    assert (paths.ids[:, 2] >= 0).sum(axis=-1).tolist() == [2] * 30


def test_ties_go_to_the_lower_id_in_every_batch_shape(computer):
    router = computer._router
    with torch.no_grad():
        router.heads.weight[3] = router.heads.weight[1]  # experts 1 and 3 of layer 0 tie in exact arithmetic
        router.heads.bias[3] = router.heads.bias[1]
    ids = prompt(60, seed=4)
    one = whole(computer, ids)[:, 0]
    assert np.array_equal(in_chunks(computer, ids, 1)[:, 0], one)
    has_3 = (one == 3).any(axis=-1)
    assert has_3.any()
    assert (one[has_3] == 1).any(axis=-1).all()
