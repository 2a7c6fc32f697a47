"""Packed paths give back what was put in, and take little room."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pregate.base.errors import ProtocolError
from pregate.model.config import LayerCut
from pregate.model.packed_paths import PackedPaths
from pregate.model.paths import Paths

LAYERS, COLUMNS = 3, 4
CUTS = [LayerCut(9, 0, 4, 8)] * LAYERS


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
    sent = data.draw(st.integers(0, len(pieces)))  # after so many it travels
    for number, piece in enumerate(pieces[1:]):
        packed = PackedPaths.from_frames(packed.to_frames()) if number == sent else packed
        packed.append(piece)
    packed.check(CUTS, packed.num_tokens, packed)
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


FRAMES = PackedPaths.of(random_paths(5, 0, weighted=True, ragged=True), max_id=8).to_frames()


@pytest.mark.parametrize(
    ("frame", "change", "says"),
    [
        (0, lambda data: data[:-1], "header of another size"),
        (0, lambda data: b"\xff" * len(data), "out of bounds"),
        (0, lambda data: data[:24] + b"\x02" + data[25:], "unknown flags"),
        (0, lambda data: b"\x06" + data[1:], "counts for 6 tokens"),
        (1, lambda data: bytes(len(data)), "counts of 0 ids"),
        (1, lambda data: b"\xff" + data[1:], "counts of"),
        (2, lambda data: data[:-1], "counts of"),
        (3, lambda data: data[:-4], "bytes of weights"),
    ],
)
def test_frames_that_do_not_fit_each_other_are_refused(frame, change, says):
    frames = list(FRAMES)
    frames[frame] = change(frames[frame])
    with pytest.raises(ProtocolError, match=says):
        PackedPaths.from_frames(frames)


@pytest.mark.parametrize(
    ("ids", "num_tokens", "says"),
    [
        ([9, -1, -1, -1], 1, "outside its layer's"),
        ([1, 1, -1, -1], 1, "must ascend"),
        ([2, 1, -1, -1], 1, "must ascend"),
        ([1, 2, -1, -1], 2, "the prompt has 2 tokens"),
    ],
)
def test_ids_from_elsewhere_are_held_to_the_model(ids, num_tokens, says):
    packed = PackedPaths.of(Paths(np.tile(np.array(ids, np.int16), (1, LAYERS, 1))), max_id=8)
    with pytest.raises(ProtocolError, match=says):
        PackedPaths.from_frames(packed.to_frames()).check(CUTS, num_tokens, packed)


def test_weights_from_elsewhere_are_finite():
    weights = np.full((1, LAYERS, COLUMNS), np.nan, np.float32)
    ids = np.broadcast_to(np.arange(COLUMNS, dtype=np.int16), weights.shape)
    packed = PackedPaths.of(Paths(ids, weights), max_id=8)
    with pytest.raises(ProtocolError, match="not finite"):
        packed.check(CUTS, 1, packed)
