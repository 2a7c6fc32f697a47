import numpy as np
import pytest

from pregate.base.errors import UserError
from pregate.cluster.placement import STRATEGIES, Placement, check, place


def test_linear_gives_contiguous_blocks():
    placement = place([5, 2], num_hosts=2, strategy="linear")
    assert placement.hosts_of.tolist() == [[0, 0, 0, 1, 1], [0, 1, -1, -1, -1]]


def test_round_robin_deals_like_cards():
    placement = place([5, 0, 3], num_hosts=3, strategy="round_robin")
    assert placement.hosts_of.tolist() == [[0, 1, 2, 0, 1], [-1] * 5, [2, 0, 1, -1, -1]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_host_has_the_odd_expert_in_every_layer(strategy):
    """Of five experts a layer the first of two hosts once held three everywhere, and did 70 % of the demo's work."""
    placement = place([5] * 6, 2, strategy)
    assert [len(placement.units_of(host)) for host in range(2)] == [15, 15]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_experts_of_one_number_have_one_host_where_a_token_visits_them_all(strategy):
    placement = place([5] * 6, 2, strategy, one_index=True)
    assert (placement.hosts_of == placement.hosts_of[0]).all()
    check(placement, [5] * 6, one_index=True)
    with pytest.raises(AssertionError, match=r"all layers: shares \[18, 12\] differ by more"):
        check(placement, [5] * 6)


def test_units_of_lists_each_unit_once():
    placement = place([3, 0, 2], num_hosts=2)
    assert placement.units_of(0) == [(0, 0), (0, 1), (2, 0)]
    assert placement.units_of(1) == [(0, 2), (2, 1)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_hosts", [1, 2, 3, 5])
def test_random_cuts_hold_the_invariants(strategy, num_hosts):
    rng = np.random.default_rng(num_hosts)
    for _ in range(50):
        counts = [0 if rng.random() < 0.2 else int(rng.integers(num_hosts, 70)) for _ in range(6)] + [num_hosts]
        placement = place(counts, num_hosts, strategy)
        check(placement, counts)
        units = [unit for host in range(num_hosts) for unit in placement.units_of(host)]
        assert sorted(units) == [(layer, e) for layer, count in enumerate(counts) for e in range(count)]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [((0, 1, 7), "without a home"), ((1, 2, 0), "beyond its 2"), ((0, 3, 0), "differ by more")],
)
def test_checker_sees_damage(damage, sentence):
    placement = place([5, 2], num_hosts=2)
    layer, expert, host = damage
    copies = placement.copies.copy()
    copies[layer, expert] = host
    with pytest.raises(AssertionError, match=sentence):
        check(Placement(1, 2, copies), [5, 2])


def test_a_host_holds_one_copy_of_a_unit():
    copies = np.stack([place([5, 2], num_hosts=2).hosts_of, [[1, -1, 1, 0, -1], [-1] * 5]], axis=2).astype(np.int16)
    placement = Placement(1, 2, copies)
    check(placement, [5, 2])
    assert placement.units_of(1) == [(0, 0), (0, 2), (0, 3), (0, 4), (1, 1)]
    copies[0, 3, 1] = 1
    with pytest.raises(AssertionError, match="two copies of a unit"):
        check(placement, [5, 2])


@pytest.mark.parametrize("num_hosts", [0, -1, 6])
def test_too_many_hosts_names_the_option(num_hosts):
    with pytest.raises(UserError, match=rf"hosts {num_hosts}: allowed: 0 to 5"):
        place([8, 5], num_hosts)


def test_unknown_strategy_and_dense_model():
    with pytest.raises(UserError, match="placement spread: allowed: linear, round_robin, balanced"):
        place([4], 2, "spread")
    with pytest.raises(UserError, match="no routed experts"):
        place([0, 0], 2)
