"""Choosing the cheapest step by paths: costs as section 6 of the design has them, budgets and overdue ones held."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pregate.router.engine.batching import Choice, PathBatcher, StepCosts, UnitLayout
from tests.router.engine.batching_cases import Candidate, check_choice, choose, costs, decodes, layout, random_ids


def plain_step_s(batcher: PathBatcher, members: list[Candidate]) -> float:
    """The sum over layers of the slowest host, in loops."""
    lay, cost = batcher.layout, batcher.costs
    rows = np.stack([c.rows_U for c in members]).sum(axis=0, dtype=np.int64)
    whole = cost.step_s + cost.token_s * sum(c.num_tokens for c in members)
    for layer in np.unique(lay.layer_U):
        hosts = [0.0] * lay.num_hosts
        for unit in np.flatnonzero((lay.layer_U == layer) & (rows > 0)):
            host = lay.host_U[unit]
            byte_s = cost.resident_byte_s if batcher.resident_U[unit] else cost.missing_byte_s
            hosts[host] += byte_s[host] * lay.bytes_U[unit] + rows[unit] * cost.row_s[host]
        whole += max(hosts) + cost.dispatch_s
    return whole


def some_batcher(rng: np.random.Generator, num_layers=3, num_routed=6, num_hosts=2) -> PathBatcher:
    hosts = rng.integers(0, num_hosts, (num_layers, num_routed))
    hosts[-1, -2:] = -1  # a layer of fewer experts
    row_s, resident_s, more_s = (rng.random(num_hosts) * 1e-6 for _ in range(3))
    layout = UnitLayout(hosts, rng.integers(1, 2000, num_layers).tolist(), num_hosts)
    batcher = PathBatcher(
        layout, StepCosts(tuple(row_s), tuple(resident_s), tuple(resident_s + more_s), 1e-4, 1e-3, 1e-5)
    )
    batcher.resident_U = rng.random(batcher.layout.num_units) < 0.5
    return batcher


def some_candidates(rng: np.random.Generator, batcher: PathBatcher, num: int) -> list[Candidate]:
    found = []
    for _ in range(num):
        num_tokens = int(rng.choice([1, 1, 1, 5]))
        ids = random_ids(rng, num_tokens, 3, 4, 2)
        found.append(Candidate(num_tokens, batcher.layout.rows(ids), bool(rng.random() < 0.2)))
    return sorted(found, key=lambda c: not c.overdue)


def test_the_longest_queue_goes_where_units_are_the_cost():
    """One index for all layers, as in Read-ME: texts on experts 0 (twice), 1 (four times) and 2 (once)."""
    batcher = PathBatcher(layout(2, 7), costs())
    expert = [0, 1, 1, 2, 1, 0, 1]
    ids = np.tile(np.array(expert, dtype=np.int16)[:, None, None], (1, 2, 1))
    choice = choose(batcher, decodes(batcher, ids), 512)
    assert sorted(choice.order) == [1, 2, 4, 6] and choice.num_units == 2
    assert choice.step_s == pytest.approx(2 * (1e-3 + 4 * 1e-6))
    dear = PathBatcher(layout(2, 7), costs(step_s=1.0))
    assert sorted(choose(dear, decodes(dear, ids), 512).order) == list(range(7)), (
        "what is shared by all is shared by all"
    )


def test_those_that_came_first_go_where_others_would_save_little():
    """Four of six fit. The last two share a unit with the first: together they take a unit less, of little or much."""
    ids = np.array([0, 1, 2, 0, 0, 0], dtype=np.int16)[:, None, None]
    for step_s, expected in ((0.1, [0, 1, 2, 3]), (0.0, [0, 3, 4, 5])):
        batcher = PathBatcher(layout(1, 3), costs(step_s=step_s))
        assert sorted(choose(batcher, decodes(batcher, ids), 4).order) == expected


def test_a_missing_unit_waits_for_those_that_are_there():
    batcher = PathBatcher(layout(1, 4), costs(step_s=1e-4))
    batcher.resident_U = np.array([True, True, True, False])
    ids = np.array([0, 3, 3, 1], dtype=np.int16)[:, None, None]
    assert sorted(choose(batcher, decodes(batcher, ids), 512).order) == [0, 3]
    late = [
        Candidate(c.num_tokens, c.rows_U, n == 0)
        for n, c in enumerate([decodes(batcher, ids)[i] for i in (1, 0, 2, 3)])
    ]
    order = choose(batcher, late, 512).order
    assert order[0] == 0 and 2 in order, "who is overdue goes first, and with him who needs the same"


def test_hosts_work_side_by_side():
    """A unit of a host that waits anyway costs nothing."""
    batcher = PathBatcher(layout(1, 4, num_hosts=2), costs(2, step_s=1e-6))
    ids = np.array([[[0]], [[2]], [[0]]], dtype=np.int16)
    assert sorted(choose(batcher, decodes(batcher, ids), 512).order) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(30))
def test_the_seconds_of_a_step_are_the_sum_of_the_slowest_hosts(seed):
    rng = np.random.default_rng(seed)
    batcher = some_batcher(rng)
    candidates = some_candidates(rng, batcher, 12)
    choice = choose(batcher, candidates, 1000)
    members = [candidates[n] for n in choice.order]
    assert choice.step_s == pytest.approx(plain_step_s(batcher, members), rel=1e-4)
    rows = np.stack([c.rows_U for c in members]).sum(axis=0, dtype=np.int64)
    assert choice.num_units == (rows > 0).sum()
    assert batcher.step_s(rows, sum(c.num_tokens for c in members)) == pytest.approx(choice.step_s, rel=1e-4)


def first_that_fit(candidates: list[Candidate], budget: int) -> tuple[int, ...]:
    before = [sum(c.num_tokens for c in candidates[:n]) for n in range(len(candidates))]
    return tuple(n for n, num_tokens in enumerate(before) if num_tokens < budget)


def saves(batcher: PathBatcher, candidates: list[Candidate], choice: Choice, budget: int) -> float:
    """The share of seconds a token that a choice saves over those that came first."""

    def token_s(order: tuple[int, ...]) -> float:
        rows = np.stack([candidates[n].rows_U for n in order]).sum(axis=0, dtype=np.int64)
        num_tokens = min(budget, sum(candidates[n].num_tokens for n in order))
        return batcher.step_s(rows, num_tokens) / num_tokens

    return 1 - token_s(choice.order) / token_s(first_that_fit(candidates, budget))


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 60))
def test_budgets_are_held_and_nobody_overdue_is_left_out(seed, num, budget):
    rng = np.random.default_rng(seed)
    batcher = some_batcher(rng)
    candidates = some_candidates(rng, batcher, num)
    choice = choose(batcher, candidates, budget)
    check_choice(choice, candidates, budget)
    assert choice.order == first_that_fit(candidates, budget) or saves(batcher, candidates, choice, budget) > 0.099
    if not any(c.overdue for c in candidates) and sum(c.num_tokens for c in candidates) <= budget:
        per_token = choice.step_s / sum(candidates[n].num_tokens for n in choice.order)
        everyone = plain_step_s(batcher, candidates) / sum(c.num_tokens for c in candidates)
        assert per_token <= everyone * 1.0001, "never dearer a token than to run all"


def test_small_cases_come_near_the_best_of_all_subsets():
    """Of 7 candidates on random paths, against every subset."""
    worse = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        batcher = PathBatcher(layout(3, 5, num_hosts=2), costs(2, step_s=float(rng.choice([0, 1e-3, 1e-2]))))
        candidates = decodes(batcher, random_ids(rng, 7, 3, 5, 1))
        choice = choose(batcher, candidates, 512)
        subsets = [c for n in range(1, 8) for c in combinations(candidates, n)]
        best = min(plain_step_s(batcher, list(some)) / len(some) for some in subsets)
        worse.append(choice.step_s / len(choice.order) / best)
    assert max(worse) < 1.35 and np.mean(worse) < 1.1, (max(worse), np.mean(worse))
