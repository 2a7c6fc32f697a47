from __future__ import annotations

import numpy as np
import pytest

from pregate.convert.domains.cut import active_width, domain_cut, strongest
from pregate.convert.measure.overlap import permanent_channels
from pregate.model.config import LayerCut


@pytest.mark.parametrize(
    ("width", "share", "expected"), [(11008, 0.5, 5504), (512, 0.75, 384), (172, 0.25, 43), (3, 0.1, 1), (8, 1.0, 8)]
)
def test_the_width_is_exactly_the_share(width: int, share: float, expected: int):
    assert active_width(width, share) == expected


def test_strongest_channels_by_hand():
    """Three domains; ties at the edge go to the lower channel, and there are never fewer than asked for."""
    scores = np.array([[1.0, 3, 3, 2, 3], [5, 0, 0, 0, 0], [2, 2, 2, 2, 2]])
    assert strongest(scores, 2).tolist() == [[1, 2], [0, 1], [0, 1]]
    assert strongest(scores, 5).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_a_released_threshold_would_lose_one():
    """The released code keeps what is strictly above the 5504th largest value: 5503 of 11008."""
    scores = np.random.default_rng(0).random((2, 11008))
    above = scores[0] > np.sort(scores[0])[-5504]
    assert above.sum() == 5503
    chosen = strongest(scores, active_width(11008, 0.5))
    assert chosen.shape == (2, 5504)
    assert set(np.flatnonzero(above)) < set(chosen[0])


def test_permanent_channels_by_hand():
    chosen = np.array([[0, 2, 5, 6], [1, 2, 5, 6], [2, 3, 5, 6]])
    assert permanent_channels(chosen).tolist() == [2, 5, 6]


def test_both_cuts_by_hand():
    """The docstring's example: both have 0 to 4 in common, and 2 scores least of them."""
    scores = np.zeros((2, 12))
    scores[:, :5] = [7.0, 8.0, 6.0, 9.0, 8.0]
    scores[0, [5, 7, 9]] = scores[1, [6, 8, 10]] = 5
    fused, split = domain_cut(scores, 8, "fused")
    assert fused == LayerCut(num_routed=2, num_shared=0, num_active=1, expert_width=8)
    assert split.shared.tolist() == []
    assert split.routed_RM.tolist() == [[0, 1, 2, 3, 4, 5, 7, 9], [0, 1, 2, 3, 4, 6, 8, 10]]
    separate, split = domain_cut(scores, 8, "separate")
    assert separate == LayerCut(num_routed=2, num_shared=1, num_active=1, expert_width=4)
    assert split.shared.tolist() == [0, 1, 3, 4]
    assert split.routed_RM.tolist() == [[2, 5, 7, 9], [2, 6, 8, 10]]
    assert split.neuron_index.tolist() == [0, 1, 3, 4, 2, 5, 7, 9, 2, 6, 8, 10]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_active", [12, 13, 20, 32])
def test_separate_takes_the_largest_shared_part_there_is(seed: int, num_active: int):
    rng = np.random.default_rng(seed)
    common = rng.random(32)
    scores = common + 0.2 * rng.random((4, 32))
    cut, split = domain_cut(scores, num_active, "separate")
    chosen, shared = strongest(scores, num_active), set(split.shared)
    available = len(permanent_channels(chosen))
    assert len(shared) == cut.shared_width <= available
    assert (cut.num_shared + 1) * cut.expert_width == num_active
    larger = [n for n in range(1, num_active + 1) if num_active % n == 0 and n - 1 > cut.num_shared]
    assert all(num_active // n * (n - 1) > available for n in larger)
    for routed, all_of in zip(split.routed_RM, chosen, strict=True):
        assert shared.isdisjoint(routed)
        assert sorted(shared | set(routed)) == all_of.tolist()


def test_domains_that_agree_in_everything_still_leave_an_expert():
    scores = np.tile(np.arange(8.0), (2, 1))
    cut, split = domain_cut(scores, 4, "separate")
    assert cut == LayerCut(2, 3, 1, 1)
    assert split.shared.tolist() == [5, 6, 7]
    assert split.routed_RM.tolist() == [[4], [4]]
