"""CMoE (arXiv 2502.04416): profile one FFN's activations and divide its neurons into shared and routed experts.

The values are those of the released code where paper and code differ; `pregate convert` prints none of this.

Shape letters: T tokens, D hidden width, I neurons of the dense FFN, N of them to cluster, K marks per token, R routed
experts (clusters), M expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from pregate.convert.cut.assignment import balanced_assignment
from pregate.kernels.reference import Activation
from pregate.model.config import LayerCut
from pregate.model.gated_mlp import GatedMLP

#: Rows profiled at a time: bounds the [rows, I] activations in memory.
CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Profile:
    """What the activations of one FFN say of its neurons.

    `marks_TK` int64: each token's K neurons of greatest activation; `rate_I` float64: the share of tokens that
    mark a neuron. `contribution_I` float64: mean over tokens of |h_i| times the norm of down column i, on the raw
    activations. All on the CPU.
    """

    marks_TK: torch.Tensor
    rate_I: torch.Tensor
    contribution_I: torch.Tensor


@dataclass(frozen=True)
class NeuronSplit:
    """Who a layer's neurons belong to, as ids of the parent's neurons.

    `shared` [S * M] and each row of `routed_RM` ascend. A neuron may be in several experts, or in none.
    """

    shared: np.ndarray
    routed_RM: np.ndarray

    @property
    def neuron_index(self) -> np.ndarray:
        """The parent neuron of every row, shared first, then expert by expert."""
        return np.concatenate([self.shared, self.routed_RM.reshape(-1)]).astype(np.int32)


def profile(
    x_TD: torch.Tensor, mlp: GatedMLP, act: Activation, marks_per_token: int, activations: str = "cosine"
) -> Profile:
    """Profile one gated FFN on its inputs `x_TD`.

    Marks are each token's `marks_per_token` largest activations by absolute value: "cosine", x normalised per token
    and every gate and up row normalised (in L2; the released code), or "raw" (the paper's text).
    """
    norms = [weight.norm(dim=-1).clamp_min(1e-12) for weight in (mlp.gate, mlp.up)]
    marks, mass_I = [], torch.zeros(mlp.width, dtype=torch.float64, device=x_TD.device)
    for rows_TD in x_TD.split(CHUNK_TOKENS):
        gate_TI, up_TI = F.linear(rows_TD, mlp.gate), F.linear(rows_TD, mlp.up)
        raw_TI = act(gate_TI) * up_TI
        mass_I += raw_TI.abs().sum(dim=0, dtype=torch.float64)
        if activations == "cosine":
            # Dividing the products is normalising rows and inputs, without a normalised copy of the weights.
            length_T1 = rows_TD.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            raw_TI = act(gate_TI / length_T1 / norms[0]) * (up_TI / length_T1 / norms[1])
        marks.append(raw_TI.abs().topk(marks_per_token, dim=-1).indices.cpu())
    marks_TK, num_tokens = torch.cat(marks), x_TD.shape[0]
    rate_I = torch.bincount(marks_TK.flatten(), minlength=mlp.width).double() / num_tokens
    down_I = torch.linalg.vector_norm(mlp.down, dim=0, dtype=torch.float64)  # no float64 copy of the matrix
    contribution_I = mass_I / num_tokens * down_I
    return Profile(marks_TK, rate_I, contribution_I.cpu())


def shared_neurons(profile: Profile, width: int, shared_by: str) -> np.ndarray:
    """The `width` neurons of greatest rate or contribution, ascending; ties go to the lower neuron."""
    score_I = profile.rate_I if shared_by == "rate" else profile.contribution_I
    return torch.argsort(score_I, descending=True, stable=True)[:width].sort().values.numpy()


def split_by_marks(
    profile: Profile, cut: LayerCut, shared: np.ndarray, max_iterations: int = 1, distance: str = "l1"
) -> NeuronSplit:
    """Cluster the neurons that are not `shared` into experts by which tokens mark them (CMoE, section 3.2).

    The first centroids are the columns of the R remaining neurons of highest rate. Ties go to the lower neuron.
    """
    candidates = torch.from_numpy(np.setdiff1d(np.arange(len(profile.rate_I)), shared))
    by_rate = torch.argsort(profile.rate_I[candidates], descending=True, stable=True)
    seeds = candidates[by_rate[: cut.num_routed]]
    labels_N = cluster_marks(profile.marks_TK, candidates, seeds, max_iterations, distance)
    ids = candidates.numpy()
    return NeuronSplit(shared, np.stack([ids[labels_N == cluster] for cluster in range(cut.num_routed)]))


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
