"""CMoE (arXiv 2502.04416): profile one FFN's activations and divide its neurons into shared and routed experts.

The values are those of the released code where paper and code differ; `pregate convert` prints none of this.

Shape letters: T tokens, D hidden width, I neurons of the dense FFN, K marks per token, R routed experts, M expert
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from pregate.convert.cut.clustering import cluster_marks
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
