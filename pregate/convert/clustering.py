"""Balanced clustering of neurons by their marks (CMoE, section 3.2 of the paper, values of the released code).

Shape letters: N neurons to cluster, R clusters, T tokens, K marks per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pregate.convert.assignment import balanced_assignment


@dataclass(frozen=True)
class Clusters:
    """Cluster of each candidate neuron, int64 [N], and the index among the N of each cluster's representative [R]."""

    labels_N: np.ndarray
    representatives_R: np.ndarray


def cluster_marks(
    marks_TK: torch.Tensor, candidates_N: torch.Tensor, seeds_R: torch.Tensor, max_iterations: int
) -> Clusters:
    """Cluster candidate neurons into R groups of equal size by which tokens marked them.

    A neuron's feature is its 0/1 column over tokens: 1 where it is among the token's marks. `marks_TK` holds
    neuron ids, `candidates_N` the ids to cluster (ascending), `seeds_R` those whose columns are the first
    centroids. Distance is L1 (the released code; the paper's text says L2). `max_iterations` assignments, each
    followed by a mean; 1 in the released code. The representative is the member nearest to its final mean.
    """
    num_candidates, num_clusters = len(candidates_N), len(seeds_R)
    position_I = torch.full((int(max(marks_TK.max(), candidates_N.max())) + 1,), num_candidates)
    position_I[candidates_N] = torch.arange(num_candidates)
    marks_TK = position_I[marks_TK]  # shared neurons all become number N, a row that is dropped below
    centroids_TR = (marks_TK[:, :, None] == position_I[seeds_R]).any(dim=1).double()
    labels_N = torch.full((num_candidates,), -1)
    for _ in range(max_iterations):
        cost_NR = l1_distance(marks_TK, num_candidates, centroids_TR)
        new_N = torch.from_numpy(balanced_assignment(cost_NR.numpy(), num_candidates // num_clusters))
        if torch.equal(new_N, labels_N):
            break
        labels_N = new_N
        centroids_TR = means(marks_TK, labels_N, num_clusters)
    distance_N = l1_distance(marks_TK, num_candidates, centroids_TR).gather(1, labels_N[:, None])[:, 0]
    nearest = [_first_argmin(distance_N, labels_N == cluster) for cluster in range(num_clusters)]
    return Clusters(labels_N.numpy(), np.array(nearest, dtype=np.int64))


def l1_distance(marks_TK: torch.Tensor, num_candidates: int, centroids_TR: torch.Tensor) -> torch.Tensor:
    """L1 distance [N, R] of 0/1 columns a to centroids c in [0, 1]: sum |a - c| = sum c + sum of (1 - 2c) at marks."""
    change_TR = 1.0 - 2.0 * centroids_TR
    cost = torch.zeros(num_candidates + 1, centroids_TR.shape[1], dtype=torch.float64)
    for mark_T in marks_TK.unbind(dim=1):
        cost.index_add_(0, mark_T, change_TR)
    return cost[:num_candidates] + centroids_TR.sum(dim=0)


def means(marks_TK: torch.Tensor, labels_N: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Mean column [T, R] of each cluster's members."""
    label_of = torch.cat([labels_N, torch.tensor([num_clusters])])
    hits = torch.nn.functional.one_hot(label_of[marks_TK], num_clusters + 1).sum(dim=1)[:, :num_clusters]
    return hits.double() / (len(labels_N) // num_clusters)


def _first_argmin(values_N: torch.Tensor, allowed_N: torch.Tensor) -> int:
    return int(values_N.masked_fill(~allowed_N, torch.inf).argmin())
