"""Balanced clustering of neurons by their marks (CMoE, section 3.2 of the paper, values of the released code).

Shape letters: N neurons to cluster, R clusters, T tokens, K marks per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch


def balanced_assignment(cost_NR: np.ndarray, size: int) -> np.ndarray:
    """Assign each of N rows to one of R columns, `size` rows each, at the least total cost; returns int64 [N].

    Exact, by successive shortest paths on a graph of only R nodes: rows start in their cheapest column, then one
    row at a time moves along the cheapest chain of columns from an overfull to an underfull one. Memory N * R;
    the square assignment problem it replaces needs N * N. Deterministic: ties go to the lower index.

    Example: cost [[0, 5], [1, 2], [2, 9], [3, 4]], size 2 gives [0, 1, 0, 1].
    """
    num_rows, num_columns = cost_NR.shape
    if num_rows != num_columns * size:
        raise ValueError(f"balanced assignment: {num_rows} rows do not fill {num_columns} columns of {size}")
    column_N = cost_NR.argmin(axis=1)
    counts = np.bincount(column_N, minlength=num_columns)
    moves = _Moves(cost_NR, column_N)
    while (counts > size).any():
        source = int(np.argmax(counts > size))
        path = _cheapest_path(moves.cost_RR, source, counts < size)
        for start, stop in pairwise(path):
            moves.apply(start, stop)
        moves.refresh(path)
        counts[path[0]] -= 1
        counts[path[-1]] += 1
    return column_N


class _Moves:
    """The cheapest single-row move between every two columns, kept up to date as rows move."""

    def __init__(self, cost_NR: np.ndarray, column_N: np.ndarray) -> None:
        self._cost_NR, self._column_N = cost_NR, column_N
        num_columns = cost_NR.shape[1]
        self.cost_RR = np.full((num_columns, num_columns), np.inf)
        self._row_RR = np.zeros((num_columns, num_columns), dtype=np.int64)
        self.refresh(range(num_columns))

    def refresh(self, columns: range | list[int]) -> None:
        for column in columns:
            members = np.flatnonzero(self._column_N == column)
            if members.size == 0:
                self.cost_RR[column] = np.inf
                continue
            change = self._cost_NR[members] - self._cost_NR[members, column][:, None]
            best = change.argmin(axis=0)
            self.cost_RR[column] = change[best, np.arange(change.shape[1])]
            self._row_RR[column] = members[best]
            self.cost_RR[column, column] = np.inf

    def apply(self, start: int, stop: int) -> None:
        """Move the cheapest row from `start` to `stop`; `refresh` both once the whole chain has moved."""
        self._column_N[self._row_RR[start, stop]] = stop


def _cheapest_path(cost_RR: np.ndarray, source: int, is_goal_R: np.ndarray) -> list[int]:
    """Bellman-Ford from `source` to the nearest goal (edges may be negative, cycles never are)."""
    num_nodes = len(cost_RR)
    distance = np.full(num_nodes, np.inf)
    distance[source] = 0.0
    parent = np.full(num_nodes, -1)
    for _ in range(num_nodes - 1):
        through = distance[:, None] + cost_RR
        best = through.argmin(axis=0)
        shorter = through[best, np.arange(num_nodes)] < distance - 1e-9  # rounding must not close a cycle
        if not shorter.any():
            break
        distance = np.where(shorter, through[best, np.arange(num_nodes)], distance)
        parent = np.where(shorter, best, parent)
    node = int(np.where(is_goal_R, distance, np.inf).argmin())
    path = [node]
    while path[-1] != source:
        path.append(int(parent[path[-1]]))
    return path[::-1]


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
        cost_NR = _l1_distance(marks_TK, num_candidates, centroids_TR)
        new_N = torch.from_numpy(balanced_assignment(cost_NR.numpy(), num_candidates // num_clusters))
        if torch.equal(new_N, labels_N):
            break
        labels_N = new_N
        centroids_TR = _means(marks_TK, labels_N, num_clusters)
    distance_N = _l1_distance(marks_TK, num_candidates, centroids_TR).gather(1, labels_N[:, None])[:, 0]
    nearest = [_first_argmin(distance_N, labels_N == cluster) for cluster in range(num_clusters)]
    return Clusters(labels_N.numpy(), np.array(nearest, dtype=np.int64))


def _l1_distance(marks_TK: torch.Tensor, num_candidates: int, centroids_TR: torch.Tensor) -> torch.Tensor:
    """L1 distance [N, R] of 0/1 columns a to centroids c in [0, 1]: sum |a - c| = sum c + sum of (1 - 2c) at marks."""
    change_TR = 1.0 - 2.0 * centroids_TR
    cost = torch.zeros(num_candidates + 1, centroids_TR.shape[1], dtype=torch.float64)
    for mark_T in marks_TK.unbind(dim=1):
        cost.index_add_(0, mark_T, change_TR)
    return cost[:num_candidates] + centroids_TR.sum(dim=0)


def _means(marks_TK: torch.Tensor, labels_N: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Mean column [T, R] of each cluster's members."""
    label_of = torch.cat([labels_N, torch.tensor([num_clusters])])
    hits = torch.nn.functional.one_hot(label_of[marks_TK], num_clusters + 1).sum(dim=1)[:, :num_clusters]
    return hits.double() / (len(labels_N) // num_clusters)


def _first_argmin(values_N: torch.Tensor, allowed_N: torch.Tensor) -> int:
    return int(values_N.masked_fill(~allowed_N, torch.inf).argmin())
