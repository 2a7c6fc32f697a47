"""What steps took corrects what constants say of the next."""

from __future__ import annotations

import numpy as np
import pytest

from pregate.router.engine.batching import PathBatcher
from pregate.router.engine.step_fit import StepFit
from tests.router.engine.batching_cases import choose, costs, decodes, layout


def steps(rng: np.random.Generator, num: int) -> np.ndarray:
    """Parts of steps [N, 4] whose sizes are orders apart; loads are none in half of the steps."""
    loads_N = rng.uniform(1e-3, 5e-2, num) * rng.integers(0, 2, num)
    return np.stack([np.full(num, 2e-2), rng.uniform(1e-4, 1e-2, num), rng.uniform(1e-3, 5e-2, num), loads_N], axis=1)


@pytest.mark.parametrize("true", [(1, 1, 1, 1), (1.5, 2, 0.2, 0.2), (0.5, 1, 1, 4), (1, 1, 2, 0.1), (10, 10, 10, 10)])
def test_factors_come_near_what_steps_were_made_with(true):
    rng, fit = np.random.default_rng(0), StepFit()
    for parts_4 in steps(rng, 400):
        fit.add(parts_4, float(parts_4 @ true) * rng.uniform(0.95, 1.05))
    parts_4 = steps(rng, 50).mean(axis=0)
    assert fit.factors_4 @ parts_4 == pytest.approx(np.array(true) @ parts_4, rel=0.05)
    assert fit.factors_4[2:].tolist() == pytest.approx(true[2:], rel=0.25, abs=0.1)


def test_what_is_small_beside_the_rest_keeps_its_constant():
    rng, fit = np.random.default_rng(0), StepFit()
    for parts_4 in np.array([[2e-2, 5e-4, 3e-2, 0]]) * rng.uniform(0.5, 1.5, (300, 4)):
        fit.add(parts_4, parts_4.sum() * rng.uniform(0.85, 1.15))
    assert 0.7 < fit.factors_4[1] < 1.4


def test_parts_that_take_nothing_keep_their_factors():
    fit = StepFit()
    fit.add(np.zeros(4), 0.0)
    fit.add(np.array([1e-2, 0.0, 1e-2, 0.0]), 4e-2)
    assert fit.factors_4.tolist() == [pytest.approx(2, rel=0.01), 1, pytest.approx(2, rel=0.01), 1]


def test_a_step_that_stood_still_says_little():
    fit = StepFit()
    for _ in range(50):
        fit.add(np.array([1e-2, 1e-3, 1e-2, 0]), 2.1e-2)
    fit.add(np.array([1e-2, 1e-3, 1e-2, 0]), 30.0)
    assert fit.factors_4.max() < 1.3


def test_what_is_found_to_cost_nothing_is_not_saved():
    """A unit that is missing is dear by the constants, so whoever asks for it waits; steps show that it is not."""
    batcher = PathBatcher(layout(1, 4), costs(step_s=1e-3))
    batcher.resident_U = np.array([True, True, True, False])
    candidates = decodes(batcher, np.array([0, 3, 3, 1], dtype=np.int16)[:, None, None])
    assert sorted(choose(batcher, candidates, 512).order) == [0, 3]
    rng = np.random.default_rng(0)
    for missing in rng.integers(0, 2, 60):
        batcher.learn(np.array([1, 1, 0, missing], dtype=np.uint16), 2 + missing, 3e-3)
    assert sorted(choose(batcher, candidates, 512).order) == [0, 1, 2, 3]
    assert batcher.learned.missing_byte_s[0] < 0.3 * batcher.costs.missing_byte_s[0]


def test_whoever_came_first_runs_where_their_loads_are_hidden():
    """Hosts load ahead for those, so the step with a missing unit takes no longer; of one that is chosen they learn
    when it begins."""
    batcher = PathBatcher(layout(1, 4), costs(step_s=1e-3))
    batcher.resident_U = np.array([True, True, True, False])
    candidates = decodes(batcher, np.array([0, 3, 3, 1], dtype=np.int16)[:, None, None])
    held, missing = (np.array(rows, dtype=np.uint16) for rows in ([1, 1, 0, 0], [1, 1, 0, 2]))
    held_s, missing_s = batcher.step_s(held, 2), batcher.step_s(missing, 4)
    for _ in range(60):
        for _ in range(2):
            batcher.learn(missing, 4, missing_s, chosen=True)
    assert sorted(choose(batcher, candidates, 512).order) == [0, 3]
    for _ in range(30):  # in turn, so that the fit of all has seen both
        for took_s, chosen in ((missing_s, True), (missing_s, False), (held_s, False), (held_s, False)):
            batcher.learn(missing, 4, took_s, chosen)
    assert batcher.fit.factors_4[3] > 0.4, "loads take long, but for those who came first"
    choice = choose(batcher, candidates, 512)
    assert choice.order == (0, 1, 2, 3) and not choice.chosen


def test_those_who_came_first_are_no_choice_whatever_was_learned():
    """The same sequences in another order are the same step, told as one of whoever came first."""
    batcher = PathBatcher(layout(1, 4), costs(step_s=1e-3))
    rows_U = np.array([1, 1, 0, 0], dtype=np.uint16)
    for _ in range(40):
        batcher.learn(rows_U, 2, 1e-3, chosen=True)
        batcher.learn(rows_U, 2, 3e-3)  # after a chosen one: hosts did not know
    assert batcher.first_fit.factors_4[0] == 1.0
    for _ in range(40):
        batcher.learn(rows_U, 2, 3e-3)
    for ids in ([1], [1, 0]):
        candidates = decodes(batcher, np.array(ids, dtype=np.int16)[:, None, None])
        choice = choose(batcher, candidates, 512)
        assert choice.order == tuple(range(len(ids))) and not choice.chosen


def test_a_trial_takes_whoever_came_first():
    batcher = PathBatcher(layout(1, 4), costs(step_s=1e-3))
    batcher.resident_U = np.array([True, True, True, False])
    rows = [batcher.layout.rows(np.full((1, 1, 1), n)) for n in (3, 0, 0)]
    assert batcher.choose([1, 1, 1], rows, 0, 512).order == (1, 2)
    assert batcher.choose([1, 1, 1], rows, 0, 512, trial=True).order == (0, 1, 2)


def test_what_was_learned_holds_where_units_lie_elsewhere():
    batcher = PathBatcher(layout(1, 4), costs(step_s=1e-3))
    rows_U = np.array([1, 0, 0, 1], dtype=np.uint16)
    expected_s = batcher.step_s(rows_U, 2)
    for _ in range(200):
        batcher.learn(rows_U, 2, 3 * expected_s)
    moved, _ = batcher.placed(np.zeros((1, 4), dtype=np.int64), 1)
    assert moved.step_s(rows_U, 2) == pytest.approx(3 * expected_s, rel=0.02)
