"""The plan of a step: hand-made cases and invariants over random paths."""

import numpy as np
import pytest

from pregate.router.engine.planning import check_plan, make_plan


def random_paths(rng, num_tokens, num_layers, num_routed, k_max):
    ids = np.full((num_tokens, num_layers, k_max), -1, dtype=np.int16)
    for row in ids.reshape(-1, k_max):
        k = rng.integers(0, k_max + 1)
        row[:k] = np.sort(rng.choice(num_routed, size=k, replace=False))
    return ids


def test_hand_made_plan():
    ids = np.array([[[0, 1]], [[1, 2]]], dtype=np.int16)
    plan = make_plan(7, ids, np.array([[0, 0, 1]]), 2)
    first, second = plan.layers[0]
    assert (first.host, first.rows.tolist(), first.index.expert_ids.tolist()) == (0, [0, 1], [0, 1])
    assert (first.index.counts.tolist(), first.index.row_index.tolist()) == ([1, 2], [0, 0, 1])
    assert (second.rows.tolist(), second.index.expert_ids.tolist(), second.index.row_index.tolist()) == ([1], [2], [0])
    assert plan.slots_LTK.tolist() == [[[0, 1], [2, 3]]]
    assert plan.pair_counts_TH.tolist() == [[2, 0], [1, 1]]
    assert plan.hosts[0].step == 7
    assert plan.hosts[1].num_rows.tolist() == [1]


@pytest.mark.parametrize("num_hosts", [1, 2, 3, 5])
def test_invariants_over_random_paths(num_hosts):
    rng = np.random.default_rng(num_hosts)
    for _ in range(20):
        num_tokens, num_layers, num_routed = rng.integers(1, 12), rng.integers(1, 5), rng.integers(1, 8)
        ids = random_paths(rng, num_tokens, num_layers, num_routed, int(rng.integers(1, num_routed + 1)))
        hosts_of = rng.integers(0, num_hosts, size=(num_layers, num_routed))
        plan = make_plan(0, ids, hosts_of, num_hosts)
        check_plan(plan, ids, hosts_of)
        assert plan.pair_counts_TH.sum() == (ids >= 0).sum()
        of_pairs = np.where(ids >= 0, rng.integers(0, num_hosts, size=ids.shape), -1)
        check_plan(make_plan(0, ids, of_pairs, num_hosts, int(num_routed)), ids, of_pairs)


def test_a_host_with_nothing_to_do_gets_no_plan():
    plan = make_plan(0, np.array([[[0]]], dtype=np.int16), np.array([[1, 0]]), 3)
    assert set(plan.hosts) == {1}


def test_no_routed_experts_at_all():
    plan = make_plan(0, np.full((3, 2, 1), -1, dtype=np.int16), np.zeros((2, 4), dtype=int), 2)
    assert plan.hosts == {}
    assert list(plan.layers) == [(), ()]


@pytest.mark.parametrize(("num_tokens", "num_routed"), [(0, 4), (3, 0)])
def test_no_tokens_and_no_experts_make_an_empty_plan(num_tokens, num_routed):
    ids = np.full((num_tokens, 2, 1), -1, dtype=np.int16)
    plan = make_plan(0, ids, np.zeros((2, num_routed), dtype=int), 2)
    check_plan(plan, ids, np.zeros((2, num_routed), dtype=int))
    assert (plan.slots_LTK == 0).all()


def test_many_more_hosts_than_pairs():
    rng = np.random.default_rng(0)
    ids, hosts_of = random_paths(rng, 9, 4, 64, 2), rng.integers(0, 1000, size=(4, 64))
    plan = make_plan(0, ids, hosts_of, 1000)
    check_plan(plan, ids, hosts_of)
    assert sorted(plan.hosts) == np.flatnonzero(plan.pair_counts_TH.sum(axis=0)).tolist()


def test_a_unit_without_home_is_refused():
    for hosts in ([0, -1], [0, 1], [0]):
        with pytest.raises(ValueError, match=r"unit \(0, 1\) has no host"):
            make_plan(0, np.array([[[1]]], dtype=np.int16), np.array([hosts]), 1)
    with pytest.raises(ValueError, match=r"unit \(1, 2\) has no host"):
        make_plan(0, np.array([[[1], [2]]], dtype=np.int16), np.array([[0, 0, 0], [0, 0, -1]]), 1)


def test_hosts_of_other_layers_than_the_paths_are_refused():
    with pytest.raises(ValueError, match=r"hosts \(1, 2\) are not of paths \(1, 2, 1\)"):
        make_plan(0, np.zeros((1, 2, 1), dtype=np.int16), np.zeros((1, 2), dtype=np.int16), 1)


def test_views_of_a_message_are_planned():
    """Read-only, and parts of more."""
    rng = np.random.default_rng(0)
    ids, hosts_of = random_paths(rng, 9, 4, 8, 2), rng.integers(0, 3, size=(4, 8)).astype(np.int16)
    for array in (ids, hosts_of):
        array.flags.writeable = False
    for part in (ids, ids[2:5], ids[:, 1:3], ids[::2]):
        hosts = hosts_of[1:3] if part.shape[1] == 2 else hosts_of
        check_plan(make_plan(0, part, hosts, 3), part, hosts)


@pytest.mark.parametrize("damage", ["rows", "slots", "host"])
def test_the_checker_notices_damage(damage):
    ids = np.array([[[0, 1]], [[1, 2]]], dtype=np.int16)
    hosts_of = np.array([[0, 0, 1]])
    plan = make_plan(0, ids, hosts_of, 2)
    if damage == "rows":
        plan.layers[0][0].rows[:] = [1, 0]
    elif damage == "slots":
        plan.slots_LTK[0, 0] = [1, 0]
    else:
        hosts_of = np.array([[1, 0, 1]])
    with pytest.raises(AssertionError):
        check_plan(plan, ids, hosts_of)
