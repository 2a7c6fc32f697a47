"""Figures of paths against numbers counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pregate.convert.report.routes import flow, layer_load, repeats, routed_flows, set_ids


def _visits(sets: list[set[int]], num_routed: int) -> np.ndarray:
    return np.array([[e in s for e in range(num_routed)] for s in sets])


def test_load():
    load = layer_load(3, _visits([{0}, {0}, {0, 1}, set()], 2))
    assert (load.layer, load.shares, load.num_active, load.idle) == (3, (0.75, 0.25), 1.0, 0.25)
    assert load.max_over_mean == 1.5
    assert load.effective_experts == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))


def test_load_of_even_and_of_unused_experts():
    assert layer_load(0, _visits([{0}, {1}, {2}], 3)).effective_experts == pytest.approx(3)
    nobody = layer_load(0, _visits([set(), set()], 3))
    assert (nobody.max_over_mean, nobody.effective_experts, nobody.idle) == (0.0, 0.0, 1.0)


def test_flow_of_one_expert_a_token():
    """0 leads to 1 twice and to 0 once, 1 always to 0; the fifth token visits nothing in the second layer."""
    first, second = _visits([{0}, {0}, {0}, {1}, {1}], 2), _visits([{1}, {1}, {0}, {0}, set()], 2)
    found = flow(1, 4, first, second)
    assert (found.first, found.second) == (1, 4)
    assert np.allclose(found.probabilities, [[1 / 3, 2 / 3], [1, 0]])
    assert found.base == (0.5, 0.5)
    assert found.entropy == pytest.approx(math.log(2))


def test_flow_of_several_experts_takes_one_of_each():
    """Token one is at 0 and 1 and goes to 2; token two is at 1 and goes to 0 and 2."""
    found = flow(0, 1, _visits([{0, 1}, {1}], 2), _visits([{2}, {0, 2}], 3))
    # joint: (0, 2) 1/4; (1, 2) 1/4 + 1/4; (1, 0) 1/4
    assert np.allclose(found.probabilities, [[0, 0, 1], [1 / 3, 0, 2 / 3]])
    assert np.allclose(found.base, [0.25, 0, 0.75])


def test_information_of_layers_that_are_the_same_and_that_are_independent():
    rng = np.random.default_rng(1)
    a, b = (np.eye(4, dtype=bool)[rng.integers(4, size=4000)] for _ in range(2))
    same = flow(0, 1, a, a)
    assert same.relative == pytest.approx(1, abs=0.01)
    assert flow(0, 1, a, b).relative < 0.005


def test_flows_pass_over_dense_layers():
    visits = {layer: _visits([{0}, {1}], 2) for layer in (0, 2, 3)}
    assert [(f.first, f.second) for f in routed_flows(visits)] == [(0, 2), (2, 3)]
    assert routed_flows({1: visits[0]}) == ()


def test_set_ids_tell_sets_apart():
    ids = set_ids(_visits([{0, 9}, {9}, {0, 9}, set()], 10))
    assert ids[0] == ids[2]
    assert len(set(ids.tolist())) == 3


def test_repeats():
    """Two documents of 3 and 2 tokens: three pairs. Layer 0 has experts 0 to 2, layer 2 has 0 and 1."""
    visits = {
        0: _visits([{0, 1}, {0, 1}, {1, 2}, {1, 2}, {1, 2}], 3),
        2: _visits([{0}, {0}, {0}, {1}, {0}], 2),
    }
    starts = np.array([True, False, False, True, False])
    neurons = {0: np.arange(12).reshape(3, 4), 2: np.arange(4).reshape(2, 2)}
    found = repeats(visits, starts, 10, neurons)
    assert (found.num_pairs, found.num_tokens, found.num_paths) == (3, 5, 3)
    assert found.same_path == pytest.approx(1 / 3)  # the first document's second token alone
    assert found.commonest_path == 0.4
    assert found.same_by_chance == pytest.approx((4 + 4 + 1) / 25)
    first, second = found.layers
    assert (first.layer, second.layer) == (0, 2)
    assert (first.same_set, second.same_set) == pytest.approx((2 / 3, 2 / 3))
    assert (first.num_sets, second.num_sets) == (2, 2)
    assert (first.num_experts, first.new_experts) == pytest.approx((2, 1 / 3))  # expert 2 comes once in three
    assert first.new_by_chance == pytest.approx(0.4 * 0.6 + 0 + 0.6 * 0.4)
    assert first.new_bytes == pytest.approx(4 * 10 / 3)
    assert first.new_row_bytes == first.new_bytes  # no overlap
    assert second.new_bytes == pytest.approx(2 * 10 / 3)


def test_rows_of_experts_that_overlap():
    """Experts [0 1 2], [1 2 3], [7 8 9]: the first swap moves 1 row of 3, the second 3 of 3."""
    visits = {0: _visits([{0}, {1}, {2}, {2}], 3)}
    starts = np.array([True, False, False, False])
    (layer,) = repeats(visits, starts, 10, {0: np.array([[0, 1, 2], [1, 2, 3], [7, 8, 9]])}).layers
    assert layer.new_bytes == pytest.approx((3 + 3 + 0) * 10 / 3)
    assert layer.new_row_bytes == pytest.approx((1 + 3 + 0) * 10 / 3)


def test_one_token_has_no_predecessor():
    found = repeats({0: _visits([{0}], 2)}, np.array([True]), 1, {0: np.arange(2).reshape(2, 1)})
    assert (found.num_pairs, found.same_path, found.layers[0].new_bytes) == (0, 0.0, 0.0)
