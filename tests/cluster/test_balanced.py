"""Balanced placements: hand-made ones, and what holds of random ones."""

import numpy as np
import pytest

from pregate.base.errors import UserError
from pregate.cluster.balanced import MOST_COPIES, balanced, num_copies
from pregate.cluster.placement import check, place


def loads_of(copies, load):
    """Work of each host in each layer [L, H], a unit's copies sharing it."""
    num_hosts = int(copies.max()) + 1
    held = (copies[..., None] == np.arange(num_hosts)).any(axis=2)
    return np.einsum("lr,lrh->lh", load / np.maximum(held.sum(axis=2), 1), held)


def zipf(rng, num_layers, num_routed, power=1.0):
    share = np.arange(1, num_routed + 1.0) ** -power
    return np.stack([rng.permutation(share / share.sum()) for _ in range(num_layers)])


def test_the_worked_examples():
    assert num_copies([3], np.array([[8.0, 3, 1]]), 3, 2 / 3).tolist() == [[3, 1, 1]]
    copies = balanced([4], np.array([[6.0, 1, 2, 3]]), 2, 0.5)
    assert copies.tolist() == [[[1, 0], [1, -1], [0, -1], [0, 1]]]


def test_the_largest_go_first_to_the_least_loaded_host_with_room():
    copies = balanced([6], np.array([[9.0, 5, 4, 2, 1, 1]]), 2)
    assert copies[0, :, 0].tolist() == [0, 1, 1, 1, 0, 0]  # 9 + 1 + 1 on one host, three units on each


def test_equal_loads_give_the_same_placement_every_time():
    first = balanced([7, 7], np.ones((2, 7)), 3, 0.5)
    assert np.array_equal(first, balanced([7, 7], np.full((2, 7), 0.3), 3, 0.5))


def test_spare_copies_are_of_the_hottest_units_of_any_layer():
    load = np.array([[10.0, 9, 1, 1], [5, 4, 1, 1]])
    assert num_copies([4, 4], load, 4, 0.5).tolist() == [[3, 2, 1, 1], [2, 1, 1, 1]]
    assert num_copies([4, 4], load, 2, 9.0).tolist() == [[2] * 4] * 2, "no more copies than hosts"


def test_without_measured_load_every_layer_has_its_share_of_the_copies():
    counts = num_copies([4] * 4, np.ones((4, 4)), 4, 0.25)
    assert counts.sum(axis=1).tolist() == [5] * 4


@pytest.mark.parametrize("seed", range(60))
def test_random_loads_hold_the_invariants(seed):
    rng = np.random.default_rng(seed)
    num_hosts = int(rng.integers(1, 13))
    counts = [0 if rng.random() < 0.2 else int(rng.integers(1, 40)) for _ in range(4)] + [num_hosts]
    load = rng.random((5, max(counts))) ** rng.integers(0, 9)
    nodes = np.sort(rng.integers(0, 4, size=num_hosts)).tolist()
    replicas = float(rng.choice([0, 0.1, 0.25, 1, 3, 20]))
    placement = place(counts, num_hosts, "balanced", load_LR=load, replicas=replicas, node_of_host=nodes)
    check(placement, counts)
    num_units, num_placed = sum(counts), int((placement.copies >= 0).sum())
    assert num_placed == min(num_units * min(num_hosts, MOST_COPIES), num_units + int(num_units * replicas + 1e-9))
    check(placement, counts, max_units=-(-num_placed // num_hosts))


@pytest.mark.parametrize("nodes", [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 2]])
@pytest.mark.parametrize("replicas", [0.25, 0.5])
def test_two_copies_are_on_two_nodes(nodes, replicas):
    rng = np.random.default_rng(0)
    for _ in range(10):
        load = zipf(rng, 4, 16, 0.5)
        copies = place([16] * 4, 4, "balanced", load_LR=load, replicas=replicas, node_of_host=nodes).copies
        for hosts in copies.reshape(-1, copies.shape[2]):
            on = {nodes[h] for h in hosts if h >= 0}
            assert len(on) == min((hosts >= 0).sum(), len(set(nodes)))


def test_copies_make_the_slowest_host_as_fast_as_the_mean():
    """Of 64 units one has a fifth of the load: no host can have an eighth without copies of it."""
    load = zipf(np.random.default_rng(1), 4, 64)
    alone, shared = (loads_of(balanced([64] * 4, load, 8, replicas), load) for replicas in (0.0, 0.25))
    assert alone.max() / alone.mean() > 1.6
    assert (shared.max(axis=1) / shared.mean(axis=1)).max() < 1.01


def test_on_one_node_hosts_are_as_even_as_if_each_had_its_own():
    load = zipf(np.random.default_rng(3), 4, 64)
    assert np.array_equal(
        balanced([64] * 4, load, 8, 0.25, node_of_host=["one"] * 8), balanced([64] * 4, load, 8, 0.25)
    )


def test_survivors_have_room_for_a_lost_hosts_units():
    """With copies for one host's share, what only a lost host had fits in place of copies that are spare then."""
    rng = np.random.default_rng(2)
    for num_hosts in (2, 4, 5):
        copies = balanced([20] * 3, zipf(rng, 3, 20), num_hosts, 1 / (num_hosts - 1))
        for lost in range(num_hosts):
            left = np.where(copies == lost, -1, copies)
            num_left = (left >= 0).sum(axis=2)
            assert (num_left - 1).clip(min=0).sum() >= (num_left == 0).sum()


def test_hosts_beyond_a_layers_experts_hold_units_of_others():
    placement = place([4] * 6, 10, "balanced", replicas=0.5)
    check(placement, [4] * 6)
    assert {len(placement.units_of(host)) for host in range(10)} == {3, 4}
    with pytest.raises(UserError, match=r"hosts 25: allowed: 0 to 24 \(each host needs an expert\)"):
        place([4] * 6, 25, "balanced")


def test_copies_need_the_balanced_placement():
    with pytest.raises(UserError, match=r"replicas 0.25: linear places no copies; allowed: with placement balanced"):
        place([4], 2, "linear", replicas=0.25)
