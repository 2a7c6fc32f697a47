"""Forecasts of the units that running requests ask for, against counting in plain Python."""

from itertools import pairwise

import numpy as np
import pytest

from pregate.model.packed_paths import PackedPaths
from pregate.model.paths import Paths
from pregate.router.engine.forecast import Forecast
from pregate.router.engine.sequence import Sequence
from pregate.router.link.messages import SamplingParams
from tests.router.engine.batching_cases import random_ids

LAYERS, ROUTED, ACTIVE = 2, 5, 2


def sequence(ids_TLK: np.ndarray) -> Sequence:
    made = Sequence("", [0] * len(ids_TLK), len(ids_TLK), 9, SamplingParams(9), 0, None, np.zeros(1))
    made.paths = PackedPaths.of(Paths(ids_TLK), ROUTED - 1)
    return made


def extend(one: Sequence, ids_1LK: np.ndarray) -> None:
    assert one.paths is not None
    one.token_ids.append(0)
    one.paths.append(Paths(ids_1LK))


def counted(texts: list[np.ndarray]) -> np.ndarray:
    """Chances [L, R] after texts that all go on, in loops."""
    tokens = [token for text in texts for token in text]
    none = np.ones((LAYERS, ROUTED))
    for text in texts:
        for layer in range(LAYERS):
            for unit in range(ROUTED):
                average = sum(unit in token[layer] for token in tokens) / len(tokens)
                table = []
                for before in text[-1][layer]:
                    pairs = [(a[layer], b[layer]) for other in texts for a, b in pairwise(list(other))]
                    num_both = sum(before in a and unit in b for a, b in pairs)
                    num_before = sum(before in token[layer] for token in tokens)
                    table.append((num_both + 4 * average) / (num_before + 4))
                weights = 0.95 ** np.arange(len(text) - 1, -1, -1.0)
                own = sum(w for w, token in zip(weights, text, strict=True) if unit in token[layer])
                none[layer, unit] *= 1 - (own + 8 * np.mean(table)) / (weights.sum() + 8)
    return 1 - none


@pytest.mark.parametrize("seed", range(5))
def test_chances_are_those_of_counting_however_tokens_come(seed):
    rng = np.random.default_rng(seed)
    texts = [random_ids(rng, int(rng.integers(2, 30)), LAYERS, ROUTED, ACTIVE) for _ in range(3)]
    whole, parts = Forecast(LAYERS, ROUTED), Forecast(LAYERS, ROUTED)
    done = [sequence(ids) for ids in texts]
    whole.note(done)
    begun = [sequence(ids[:1]) for ids in texts]
    for length in range(1, 30):
        for one, ids in zip(begun, texts, strict=True):
            if 1 < length + 1 <= len(ids):
                extend(one, ids[length : length + 1])
        parts.note(begun)
    expected = counted(texts)
    np.testing.assert_allclose(whole.likely(done), expected, atol=1e-5)
    np.testing.assert_allclose(parts.likely(begun), expected, atol=1e-5)
    whole.note(done)
    np.testing.assert_allclose(whole.likely(done), expected, atol=1e-5)
    assert not whole.likely([]).any()


def test_what_always_follows_is_nearly_sure():
    ids_TLK = np.tile(np.array([[[0]], [[1]], [[2]]], dtype=np.int16), (30, LAYERS, 1))
    cycle, forecast = sequence(ids_TLK), Forecast(LAYERS, ROUTED)
    late = sequence(ids_TLK[:1])
    forecast.note([cycle, late])
    likely_LR = forecast.likely([late])
    assert (likely_LR.argmax(axis=1) == 1).all() and (likely_LR[:, 1] > 0.75).all()
    assert not likely_LR[:, 3:].any()


def test_a_long_prompt_is_noted_in_pieces_and_traffic_that_changed_is_forgotten(monkeypatch):
    one, two = (sequence(random_ids(np.random.default_rng(n), 50, LAYERS, ROUTED, ACTIVE)) for n in (1, 2))
    whole, pieces, forgetful = (Forecast(LAYERS, ROUTED) for _ in range(3))
    whole.note([one, two])
    monkeypatch.setattr("pregate.router.engine.forecast._PIECE_TOKENS", 7)
    pieces.note([one, two])
    np.testing.assert_allclose(pieces.likely([one, two]), whole.likely([one, two]), atol=1e-5)
    monkeypatch.setattr("pregate.router.engine.forecast._HALVE_TOKENS", 40)
    before, since = np.array([[[0]], [[1]]], dtype=np.int16), np.array([[[0]], [[2]]], dtype=np.int16)
    forgetful.note([sequence(np.tile(before, (100, LAYERS, 1))), sequence(np.tile(since, (30, LAYERS, 1)))])
    late = sequence(since[:1].repeat(LAYERS, axis=1))
    forgetful.note([late])
    assert (forgetful.likely([late]).argmax(axis=1) == 2).all()


def test_rows_are_the_sum_of_the_chances_of_each():
    rng, forecast = np.random.default_rng(0), Forecast(LAYERS, ROUTED)
    texts = [sequence(random_ids(rng, num, LAYERS, ROUTED, ACTIVE)) for num in (3, 9, 20)]
    forecast.note(texts)
    each = np.stack([forecast.likely([text]) for text in texts])
    np.testing.assert_allclose(forecast.rows(texts), each.sum(axis=0), atol=1e-5)
    np.testing.assert_allclose(forecast.likely(texts), 1 - np.prod(1 - each, axis=0), atol=1e-5)
    assert not forecast.rows([]).any()
