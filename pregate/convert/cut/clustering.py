"""Balanced clustering of neurons by their marks (CMoE, section 3.2 of the paper, values of the released code).

Shape letters: N neurons to cluster, R clusters, T tokens, K marks per token.
"""

from __future__ import annotations

import numpy as np
import torch

from pregate.convert.cut.assignment import balanced_assignment


def cluster_marks(
    marks_TK: torch.Tensor, candidates_N: torch.Tensor, seeds_R: torch.Tensor, max_iterations: int, distance: str = "l1"
) -> np.ndarray:
    """Cluster candidate neurons into R groups of equal size by which tokens marked them; returns labels int64 [N].

    A neuron's feature is its 0/1 column over tokens: 1 where it is among the token's marks. `marks_TK` holds
    neuron ids, `candidates_N` the ids to cluster (ascending), `seeds_R` those whose columns are the first
    centroids. Distance is "l1" (the released code) or "l2" (the paper's text). `max_iterations` assignments, each
    followed by a mean; 1 in the released code.
    """
    num_clusters = len(seeds_R)
    marks_TK, position_I = _positions(marks_TK, candidates_N)
    centroids_TR = (marks_TK[:, :, None] == position_I[seeds_R]).any(dim=1).double()
    labels_N = torch.full((len(candidates_N),), -1)
    for _ in range(max_iterations):
        cost_NR = distances(marks_TK, len(candidates_N), centroids_TR, distance)
        new_N = torch.from_numpy(balanced_assignment(cost_NR.numpy(), len(candidates_N) // num_clusters))
        if torch.equal(new_N, labels_N):
            break
        labels_N = new_N
        centroids_TR = means(marks_TK, labels_N, num_clusters)
    return labels_N.numpy()


def representatives(marks_TK: torch.Tensor, routed_RM: np.ndarray, distance: str = "l1") -> np.ndarray:
    """The neuron id of each group's member whose marks are nearest to the group's mean, int64 [R].

    `routed_RM` holds each group's neuron ids, ascending; ties go to the lower id.
    """
    num_groups, size = routed_RM.shape
    candidates_N = torch.from_numpy(routed_RM.reshape(-1))
    marks_TK, _ = _positions(marks_TK, candidates_N)
    labels_N = torch.arange(num_groups).repeat_interleave(size)
    distance_NR = distances(marks_TK, len(candidates_N), means(marks_TK, labels_N, num_groups), distance)
    own_RM = distance_NR.gather(1, labels_N[:, None]).view(num_groups, size)
    return np.take_along_axis(routed_RM, own_RM.argmin(dim=1, keepdim=True).numpy(), axis=1)[:, 0]


def _positions(marks_TK: torch.Tensor, candidates_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Marks as positions among the N candidates, and the table [I] from ids to positions.

    Every neuron that is no candidate becomes number N.
    """
    position_I = torch.full((int(max(marks_TK.max(), candidates_N.max())) + 1,), len(candidates_N))
    position_I[candidates_N] = torch.arange(len(candidates_N))
    return position_I[marks_TK], position_I


def distances(marks_TK: torch.Tensor, num_candidates: int, centroids_TR: torch.Tensor, distance: str) -> torch.Tensor:
    """Distance [N, R] of 0/1 columns a to centroids c in [0, 1].

    L1: sum |a - c| = sum c + sum of (1 - 2c) at marks. L2 squared likewise: sum c^2 + sum of (1 - 2c) at marks.
    """
    change_TR = 1.0 - 2.0 * centroids_TR
    cost = torch.zeros(num_candidates + 1, centroids_TR.shape[1], dtype=torch.float64)
    for mark_T in marks_TK.unbind(dim=1):
        cost.index_add_(0, mark_T, change_TR)
    if distance == "l1":
        return cost[:num_candidates] + centroids_TR.sum(dim=0)
    return (cost[:num_candidates] + centroids_TR.square().sum(dim=0)).clamp_min(0).sqrt()


def means(marks_TK: torch.Tensor, labels_N: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Mean column [T, R] of each cluster's members."""
    label_of = torch.cat([labels_N, torch.tensor([num_clusters])])
    hits = torch.nn.functional.one_hot(label_of[marks_TK], num_clusters + 1).sum(dim=1)[:, :num_clusters]
    return hits.double() / (len(labels_N) // num_clusters)
