"""From one placement to another a few units at a time."""

import numpy as np
import pytest

from pregate.cluster.placement import Placement, check, place
from pregate.cluster.rebalance import Move, moved, moves, slowest_load


def placement_of(*hosts, num_hosts=2):
    return Placement(1, num_hosts, np.array([[[h] for h in hosts]], dtype=np.int16))


def test_the_worked_example():
    old, new, load = placement_of(0, 0, 1, 1), placement_of(0, 1, 0, 1), np.array([[3.0, 3, 1, 1]])
    made = moves(old, new, 8, load)
    assert made == [Move(0, 1, 0, 1), Move(0, 2, 1, 0)]
    assert np.array_equal(moved(old, made).copies, new.copies)
    assert moved(old, made).version == 2
    assert slowest_load(old, load).tolist() == [6]
    assert slowest_load(new, load).tolist() == [4]


def test_copies_share_a_units_load():
    placement = Placement(1, 2, np.array([[[0, 1], [0, -1], [1, -1]]], dtype=np.int16))
    assert slowest_load(placement, np.array([[4.0, 2, 2]])).tolist() == [4]


@pytest.mark.parametrize(("least_gain", "number"), [(0.3, 2), (0.34, 0)])
def test_a_gain_below_the_threshold_moves_nothing(least_gain, number):
    old, new = placement_of(0, 0, 1, 1), placement_of(0, 1, 0, 1)
    assert len(moves(old, new, 8, np.array([[3.0, 3, 1, 1]]), least_gain)) == number


def test_a_copy_is_loaded_before_its_source_gives_it_up_and_spare_ones_go_first():
    old = Placement(1, 3, np.array([[[0, 1], [0, -1], [2, -1]]], dtype=np.int16))
    new = Placement(1, 3, np.array([[[0, -1], [1, 2], [2, -1]]], dtype=np.int16))
    assert moves(old, new, 8, np.array([[1.0, 8, 1]])) == [Move(0, 0, 1, -1), Move(0, 1, -1, 2), Move(0, 1, 0, 1)]


@pytest.mark.parametrize("seed", range(20))
def test_every_stage_on_the_way_is_a_placement_and_the_last_is_the_new_one(seed):
    rng = np.random.default_rng(seed)
    num_hosts = int(rng.integers(2, 7))
    load, drifted = rng.random((3, 12)) ** 3, rng.random((3, 12)) ** 3
    old, new = (
        place([12] * 3, num_hosts, "balanced", load_LR=some, replicas=float(rng.choice([0, 0.25])))
        for some in (load, drifted)
    )
    room = 1 + max(len(p.units_of(host)) for p in (old, new) for host in range(num_hosts))
    now, stages = old, 0
    while made := moves(now, new, 3, drifted, least_gain=-1.0):
        assert sum(move.target >= 0 for move in made) <= 3
        now, stages = moved(now, made), stages + 1
        check(now, [12] * 3, max_units=room)
        assert stages < 40
    held = [np.sort(p.copies, axis=2)[..., -1:] for p in (now, new)]
    assert np.array_equal(held[0], held[1])
    assert slowest_load(now, drifted) == pytest.approx(slowest_load(new, drifted))
    for host in range(num_hosts):
        assert now.units_of(host) == new.units_of(host)


def test_the_first_moves_bring_the_most():
    rng = np.random.default_rng(0)
    load = rng.permuted(np.arange(1.0, 33) ** -1.0 * np.ones((4, 1)), axis=1)
    now, new = place([32] * 4, 4), place([32] * 4, 4, "balanced", load_LR=load, replicas=0.25)
    whole = slowest_load(now, load).sum() - slowest_load(new, load).sum()
    number = len([m for m in moves(now, new, 1000, load) if m.target >= 0])
    few = moves(now, new, number // 4, load)
    assert slowest_load(now, load).sum() - slowest_load(moved(now, few), load).sum() > whole / 3
