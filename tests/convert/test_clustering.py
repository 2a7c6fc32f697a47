from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pregate.convert.clustering import cluster_marks


def test_neurons_marked_together_share_a_cluster():
    # Tokens 0 to 2 mark neurons 4 and 1, tokens 3 and 4 mark 2 and 3, and one of each group is marked with neuron 0,
    # which is no candidate (shared). Seeds: 1 and 2.
    marks = torch.tensor([[4, 1, 0], [1, 4, 0], [4, 1, 0], [2, 3, 0], [3, 2, 0]])
    clusters = cluster_marks(marks, torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2]), 1)
    assert clusters.labels_N.tolist() == [0, 1, 1, 0]  # of neurons 1, 2, 3, 4
    assert clusters.representatives_R.tolist() == [0, 1]  # both members are as near: the lower neuron


def test_against_a_plain_implementation():
    """Dense 0/1 columns, cdist, scipy: the same cost, means and representatives."""
    generator = torch.Generator().manual_seed(5)
    marks = torch.rand(60, 24, generator=generator).topk(4, dim=-1).indices
    candidates = torch.tensor([n for n in range(24) if n % 4])  # 18 of 24; 3 clusters of 6
    seeds = candidates[[2, 7, 11]]
    ours = cluster_marks(marks, candidates, seeds, 1)

    dense = torch.zeros(60, 24).scatter_(1, marks, 1.0).T.double()
    columns, centroids = dense[candidates], dense[seeds]
    cost = torch.cdist(columns, centroids, p=1).numpy()
    rows, square = linear_sum_assignment(np.repeat(cost, 6, axis=1))
    assert cost[np.arange(18), ours.labels_N].sum() == pytest.approx(cost[rows, square // 6].sum())
    for cluster, representative in enumerate(ours.representatives_R):
        members = np.flatnonzero(ours.labels_N == cluster)
        distance = (columns[members] - columns[members].mean(dim=0)).abs().sum(dim=1)
        assert len(members) == 6
        assert representative == members[int(distance.argmin())]


def test_more_iterations_stop_when_nothing_moves():
    marks = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]])
    one, many = (cluster_marks(marks, torch.arange(4), torch.tensor([0, 2]), n) for n in (1, 50))
    assert one.labels_N.tolist() == many.labels_N.tolist() == [0, 0, 1, 1]
