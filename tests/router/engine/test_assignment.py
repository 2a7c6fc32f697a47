"""Units find a living host, and the same one as long as the same hosts live."""

import numpy as np
import pytest

from pregate.cluster.placement import place
from pregate.router.engine.assignment import NO_HOST, adopt, choose_hosts


def copies_of(placement) -> np.ndarray:
    return placement.hosts_of[..., None]


def test_the_example_of_the_docstring():
    copies = np.array([[[0], [1], [0], [2]]], dtype=np.int16)
    assert adopt(copies, np.array([False, True, True])).tolist() == [[[1], [1], [2], [2]]]


def test_nothing_moves_while_all_live():
    copies = copies_of(place([5, 0, 3], 3))
    assert np.array_equal(adopt(copies, np.ones(3, dtype=bool)), copies)


def test_a_living_copy_is_preferred_to_a_read():
    copies = np.array([[[0, 2], [1, -1], [2, 0]]], dtype=np.int16)
    adopted = adopt(copies, np.array([False, True, True]))
    assert adopted.tolist() == [[[2, NO_HOST], [1, NO_HOST], [2, NO_HOST]]]
    assert choose_hosts(adopted).tolist() == [[2, 1, 2]]


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_survivors_share_what_is_lost(strategy):
    num_routed, num_hosts = [16, 16, 0, 7], 4
    copies = copies_of(place(num_routed, num_hosts, strategy))
    for lost in range(num_hosts):
        alive = np.arange(num_hosts) != lost
        hosts = choose_hosts(adopt(copies, alive))
        stays = alive[copies[..., 0]] & (copies[..., 0] >= 0)
        assert np.array_equal(hosts[stays], copies[..., 0][stays]), "who lives keeps its own"
        for layer, count in enumerate(num_routed):
            served = hosts[layer, :count]
            assert alive[served].all() and (hosts[layer, count:] == NO_HOST).all()
            shares = np.bincount(served, minlength=num_hosts)[alive]
            assert not count or shares.max() - shares.min() <= 1
