"""The cut by captured contribution: an example by hand, and what holds for any layer.

Shape letters: T tokens, D hidden width, I neurons, R routed experts.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pregate.convert.cut.capture import contributions, sample_rows, split_by_capture
from pregate.convert.cut.cmoe import NeuronSplit
from pregate.convert.cut.ridge import CrossFit
from pregate.kernels.reference import activation, choose_sets, threshold_for
from pregate.model.config import LayerCut
from pregate.model.gated_mlp import GatedMLP

SELECTIONS = pytest.mark.parametrize("selection", ["top_k", "threshold"])

# Two groups of four tokens along two axes; six neurons, one shared and two routed experts of two, one active.
#
#   neuron    contribution in group A, B     sum
#     0          5    0                      20
#     1          4    0                      16
#     2          0    3                      12
#     3          0    2                       8
#     4        2.1  2.1                      16.8    always on
#     5        1.9  1.9                      15.2    always on
#
# First labels: the strongest, 0 and 4, shared; 1 5 2 3 dealt out in turn: {1, 2}, {5, 3}. Masses in A 4 and 1.9, in B
# 3 and 3.9: A runs the first, B the second. Captured: 20 + 16.8 + 4 * 4 + 4 * 3.9 = 68.4 of 88.
# With these sets neuron 0 captures 20 with the first expert and no more when shared; 4 captures 16.8 when shared and
# only half of it in either expert. So the assignment shares 4 and 5, and {0, 1}, {2, 3} capture all 88.
CONTRIBUTIONS = [[5, 0], [4, 0], [0, 3], [0, 2], [2.1, 2.1], [1.9, 1.9]]
CUT = LayerCut(num_routed=2, num_shared=1, num_active=1, expert_width=2)


def _example() -> tuple[torch.Tensor, torch.Tensor]:
    x_TD = torch.eye(2).repeat_interleave(4, dim=0)
    return x_TD, torch.tensor(CONTRIBUTIONS).T.repeat_interleave(4, dim=0)


def _random(seed: int, num_neurons: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, and contributions of neurons that fire in several directions and in none."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(400, 6, generator=generator)
    strength = 0.1 + torch.rand(num_neurons, generator=generator)
    return x_TD, ((x_TD @ torch.randn(6, num_neurons, generator=generator)).relu() + 0.2) * strength


def _groups(split: NeuronSplit) -> list[list[int]]:
    return [split.shared.tolist(), *split.routed_RM.tolist()]


@SELECTIONS
def test_the_example_by_hand(selection: str):
    x_TD, c_TI = _example()
    first, captured = split_by_capture(CrossFit(x_TD), c_TI, CUT, selection, rounds=1)
    assert _groups(first) == [[0, 4], [1, 2], [3, 5]]
    assert captured == pytest.approx(68.4 / 88)
    split, captured = split_by_capture(CrossFit(x_TD), c_TI, CUT, selection)
    assert _groups(split) == [[4, 5], [0, 1], [2, 3]]
    assert captured == pytest.approx(1.0)


def test_shared_neurons_that_are_given_stay_so():
    x_TD, c_TI = _example()
    split, captured = split_by_capture(CrossFit(x_TD), c_TI, CUT, "top_k", np.array([0, 3]))
    # 1 runs in A and 2 in B; 4 and 5 lose half wherever they are: with 4 beside 1 or beside 2 it is the same.
    assert split.shared.tolist() == [0, 3]
    assert sorted(split.routed_RM.flatten().tolist()) == [1, 2, 4, 5]
    assert {1, 2} not in [set(group) for group in split.routed_RM.tolist()]
    assert captured == pytest.approx((20 + 8 + 16 + 12 + 8.4 + 7.6) / 88)


@SELECTIONS
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "cut", [LayerCut(6, 2, 2, 3), LayerCut(8, 0, 3, 3), LayerCut(1, 3, 1, 6), LayerCut(4, 4, 0, 3)]
)
def test_a_partition_with_exact_sizes_that_captures_no_less_than_the_first(cut: LayerCut, seed: int, selection: str):
    x_TD, c_TI = _random(seed)
    _, first = split_by_capture(CrossFit(x_TD), c_TI, cut, selection, rounds=1)
    split, captured = split_by_capture(CrossFit(x_TD), c_TI, cut, selection)
    assert split.shared.shape == (cut.shared_width,)
    assert split.routed_RM.shape == (cut.num_routed, cut.expert_width)
    assert sorted(split.neuron_index.tolist()) == list(range(24))
    assert all(group == sorted(group) for group in _groups(split))
    assert 0 <= first <= captured <= 1 + 1e-6
    again, same = split_by_capture(CrossFit(x_TD), c_TI, cut, selection)
    assert (_groups(again), same) == (_groups(split), captured)


@pytest.mark.parametrize("seed", range(3))
def test_the_share_it_says_is_the_share_captured(seed: int):
    """Counted token by token: shared neurons always, routed ones where the gate fitted to their experts runs them."""
    x_TD, c_TI = _random(seed)
    cut = LayerCut(6, 2, 2, 3)
    split, captured = split_by_capture(CrossFit(x_TD), c_TI, cut, "top_k")
    mass_TR = torch.stack([c_TI[:, group].sum(dim=1) for group in split.routed_RM.tolist()], dim=1)
    scores_TR = CrossFit(x_TD).scores(mass_TR)
    total = float(c_TI[:, split.shared].sum())
    for token, scores in enumerate(scores_TR.tolist()):
        for expert in sorted(range(6), key=lambda e: -scores[e])[:2]:
            total += float(mass_TR[token, expert])
    assert captured == pytest.approx(total / float(c_TI.sum()), rel=1e-4)


def test_it_does_better_than_dealing_out():
    x_TD, c_TI = _random(0)
    _, first = split_by_capture(CrossFit(x_TD), c_TI, LayerCut(6, 2, 2, 3), "threshold", rounds=1)
    _, captured = split_by_capture(CrossFit(x_TD), c_TI, LayerCut(6, 2, 2, 3), "threshold")
    assert captured > first + 0.02


@pytest.mark.parametrize("num_active", [1, 2, 5])
def test_a_threshold_gives_just_the_mean_number(num_active: int):
    scores_TR = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    assert len(scores_TR.unique()) == 250  # no ties
    sets_TR = choose_sets(scores_TR, num_active, "threshold")
    assert int(sets_TR.sum()) == 50 * num_active
    least = -torch.inf if num_active == 5 else scores_TR[sets_TR].min()  # all: whatever a new text scores
    assert least == threshold_for(scores_TR, num_active)
    if num_active == 2:
        assert sets_TR.sum(dim=1).unique().numel() > 2  # not the same number for every token


def test_thresholds_by_hand():
    scores_TR = torch.tensor([[3.0, 1.0], [2.0, 5.0], [0.0, 4.0]])
    assert threshold_for(scores_TR, 1).item() == 3.0
    assert choose_sets(scores_TR, 1, "threshold").tolist() == [[True, False], [False, True], [False, True]]
    assert threshold_for(scores_TR, 2).item() == -torch.inf
    assert not choose_sets(scores_TR, 0, "threshold").any()
    tied = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert int(choose_sets(tied, 1, "threshold").sum()) == 3  # a tie lets all of it in


def test_the_best_of_each_token():
    sets = choose_sets(torch.tensor([[0.1, 0.3, 0.2], [9.0, -1.0, 8.0]]), 2, "top_k")
    assert sets.tolist() == [[False, True, True], [True, False, True]]


def test_sampled_rows_are_evenly_spaced():
    x_TD = torch.arange(10.0)[:, None]
    assert sample_rows(x_TD, 4).flatten().tolist() == [0, 2, 5, 7]
    assert sample_rows(x_TD, 10) is x_TD
    assert sample_rows(x_TD, 11) is x_TD
    assert sample_rows(x_TD, 1).tolist() == [[0.0]]


def test_contributions_by_hand():
    gate, up = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[-1.0, 1.0], [1.0, 1.0]])
    mlp = GatedMLP(0, nn.Module(), "mlp", nn.Module(), gate, up, torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
    # Token (2 1): relu gates 2 and 2, ups -1 and 3, h -2 and 6; down columns of length 5 and 2.
    assert contributions(torch.tensor([[2.0, 1.0]]), mlp, activation("relu")).tolist() == [[10.0, 12.0]]
