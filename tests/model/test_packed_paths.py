"""Packed paths give back what was put in, and take little room."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pregate.model.packed_paths import PackedPaths
from pregate.model.paths import Paths

LAYERS, COLUMNS = 3, 4


def random_paths(num_tokens: int, seed: int, weighted: bool, ragged: bool, num_experts: int = 9) -> Paths:
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, COLUMNS + 1, (num_tokens, LAYERS)) if ragged else np.full((num_tokens, LAYERS), 2)
    order = np.argsort(generator.random((num_tokens, LAYERS, num_experts)), axis=2)[..., :COLUMNS]
    absent = np.arange(COLUMNS) >= counts[..., None]
    ids = np.sort(np.where(absent, num_experts, order), axis=2)
    ids = np.where(ids == num_experts, -1, ids).astype(np.int16)
    weights = np.where(ids >= 0, generator.random(ids.shape), 0).astype(np.float32) if weighted else None
    return Paths(ids, weights)


def assert_equal(found: Paths, expected: Paths) -> None:
    assert found.ids.dtype == np.int16 and np.array_equal(found.ids, expected.ids)
    assert (found.weights is None) == (expected.weights is None)
    if found.weights is not None and expected.weights is not None:
        assert np.array_equal(found.weights, expected.weights)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=8), st.booleans(), st.data())
def test_what_is_appended_is_found_again(parts, weighted, data):
    """Pieces of any length, some with as many experts for every token and some not."""
    pieces = [random_paths(n, seed, weighted, ragged) for seed, (n, ragged) in enumerate(parts)]
    packed = PackedPaths.of(pieces[0], max_id=8)
    for piece in pieces[1:]:
        packed.append(piece)
    whole = Paths.concatenate(pieces)
    assert packed.num_tokens == whole.num_tokens
    start = data.draw(st.integers(0, whole.num_tokens))
    stop = data.draw(st.integers(start, whole.num_tokens))
    assert_equal(packed.slice(start, stop), whole[start:stop])


def test_ids_above_a_byte_are_kept():
    paths = random_paths(5, 0, weighted=False, ragged=True, num_experts=300)
    assert_equal(PackedPaths.of(paths, max_id=299).slice(0, 5), paths)


@pytest.mark.parametrize(("ragged", "share"), [(False, 2 / 8), (True, 3 / 8)])
def test_it_holds_no_padding(ragged, share):
    """Two of four columns in use on average: a byte each, and one per token and layer where their number varies."""
    paths = random_paths(1000, 0, weighted=False, ragged=ragged)
    assert PackedPaths.of(paths, max_id=8).nbytes <= 1.02 * share * paths.ids.nbytes
