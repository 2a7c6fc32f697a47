from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pregate.convert.cut.cmoe import cluster_marks, representatives


def test_neurons_marked_together_share_a_cluster():
    # Tokens 0 to 2 mark neurons 4 and 1, tokens 3 and 4 mark 2 and 3, and one of each group is marked with neuron 0,
    # which is no candidate (shared). Seeds: 1 and 2.
    marks = torch.tensor([[4, 1, 0], [1, 4, 0], [4, 1, 0], [2, 3, 0], [3, 2, 0]])
    labels = cluster_marks(marks, torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2]), 1)
    assert labels.tolist() == [0, 1, 1, 0]  # of neurons 1, 2, 3, 4
    # Both members of a group are as near to its mean: the lower neuron.
    assert representatives(marks, np.array([[1, 4], [2, 3]])).tolist() == [1, 2]


@pytest.mark.parametrize(("distance", "power"), [("l1", 1), ("l2", 2)])
def test_against_a_plain_implementation(distance: str, power: int):
    """Dense 0/1 columns, cdist, scipy: the same cost, means and representatives."""
    generator = torch.Generator().manual_seed(5)
    marks = torch.rand(60, 24, generator=generator).topk(4, dim=-1).indices
    candidates = torch.tensor([n for n in range(24) if n % 4])  # 18 of 24; 3 clusters of 6
    seeds = candidates[[2, 7, 11]]
    labels = cluster_marks(marks, candidates, seeds, 1, distance)

    dense = torch.zeros(60, 24).scatter_(1, marks, 1.0).T.double()
    columns, centroids = dense[candidates], dense[seeds]
    cost = torch.cdist(columns, centroids, p=power).numpy()
    rows, square = linear_sum_assignment(np.repeat(cost, 6, axis=1))
    assert cost[np.arange(18), labels].sum() == pytest.approx(cost[rows, square // 6].sum())
    groups = np.stack([np.flatnonzero(labels == cluster) for cluster in range(3)])
    ours = representatives(marks, candidates.numpy()[groups], distance)
    for members, representative in zip(groups, ours, strict=True):
        away = (columns[members] - columns[members].mean(dim=0)).norm(p=power, dim=1)
        assert representative == candidates[members[int(away.argmin())]]


def test_more_iterations_stop_when_nothing_moves():
    marks = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]])
    one, many = (cluster_marks(marks, torch.arange(4), torch.tensor([0, 2]), n) for n in (1, 50))
    assert one.tolist() == many.tolist() == [0, 0, 1, 1]
