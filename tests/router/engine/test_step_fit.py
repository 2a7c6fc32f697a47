"""What steps took corrects what constants say of the next."""

from __future__ import annotations

import numpy as np
import pytest

from pregate.router.engine.batching import PathBatcher
from pregate.router.engine.step_fit import StepFit
from tests.router.engine.batching_cases import choose, costs, decodes, layout


def steps(rng: np.random.Generator, num: int) -> np.ndarray:
    """Parts of steps [N, 3] whose sizes are orders apart."""
    return np.stack([np.full(num, 2e-2), rng.uniform(1e-4, 1e-2, num), rng.uniform(1e-3, 5e-2, num)], axis=1)


@pytest.mark.parametrize("true", [(1.0, 1.0, 1.0), (1.5, 2.0, 0.2), (0.5, 1.0, 4.0)])
def test_factors_come_near_what_steps_were_made_with(true):
    rng, fit = np.random.default_rng(0), StepFit()
    for parts in steps(rng, 400):
        fit.add(tuple(parts), float(parts @ true) * rng.uniform(0.95, 1.05))
    assert fit.num_steps == 400
    assert fit.factors @ steps(rng, 50).mean(axis=0) == pytest.approx(
        np.array(true) @ steps(rng, 50).mean(axis=0), rel=0.15
    )
    assert fit.factors[2] == pytest.approx(true[2], rel=0.25, abs=0.1)


def test_a_step_that_stood_still_teaches_nothing():
    fit = StepFit()
    fit.add((1e-2, 1e-3, 1e-2), 30.0)
    assert fit.num_steps == 0 and fit.factors.tolist() == [1, 1, 1]


def test_what_is_found_to_cost_nothing_is_not_saved():
    """A unit that is missing is dear by the constants, so whoever asks for it waits; steps show that it is not."""
    batcher = PathBatcher(layout(1, 4), costs(step_s=1e-3))
    batcher.resident_U = np.array([True, True, True, False])
    candidates = decodes(batcher, np.array([0, 3, 3, 1], dtype=np.int16)[:, None, None])
    choice = choose(batcher, candidates, 512)
    assert sorted(choice.order) == [0, 3]
    rng = np.random.default_rng(0)
    for missing in rng.integers(0, 2, 60).tolist():
        batcher.fit.add((1e-3, 1e-6, 1e-3 + 9e-3 * missing), 2e-3)
    assert sorted(choose(batcher, candidates, 512).order) == [0, 1, 2, 3]
    assert batcher.learned.missing_byte_s[0] < 0.2 * batcher.costs.missing_byte_s[0]


def test_only_a_step_that_ran_as_it_was_chosen_teaches():
    batcher = PathBatcher(layout(1, 4), costs(step_s=1e-3))
    choice = choose(batcher, decodes(batcher, np.zeros((3, 1, 1), dtype=np.int16)), 512)
    assert (choice.num_tokens, sum(choice.parts_s)) == (3, pytest.approx(choice.step_s))
    batcher.learn(choice, 2, 2e-3)
    assert batcher.fit.num_steps == 0
    batcher.learn(choice, 3, 2e-3)
    assert batcher.fit.num_steps == 1
    moved, _ = batcher.placed(np.zeros((1, 4), dtype=np.int64), 1)
    assert moved.fit is batcher.fit, "what was learned holds where units lie elsewhere, too"
