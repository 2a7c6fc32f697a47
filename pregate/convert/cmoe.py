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

from pregate.convert.clustering import cluster_marks
from pregate.kernels.reference import Activation, gated_hidden
from pregate.model.config import LayerCut
from pregate.model.gated_mlp import GatedMLP

SHARED_BY = ("contribution", "rate")
#: Rows profiled at a time: bounds the [rows, I] activations in memory.
CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Profile:
    """What the activations of one FFN say of its neurons.

    `marks_TK` int64: each token's K neurons of greatest cosine activation; `rate_I` float64: the share of tokens that
    mark a neuron. `contribution_I` float64: mean over tokens of |h_i| times the norm of down column i, on the raw
    activations.
    """

    marks_TK: torch.Tensor
    rate_I: torch.Tensor
    contribution_I: torch.Tensor


@dataclass(frozen=True)
class NeuronSplit:
    """Who a layer's neurons belong to, as ids of the parent's neurons.

    `shared` [S * M] and each row of `routed_RM` ascend; `representatives_R` are one neuron of each routed expert.
    """

    shared: np.ndarray
    routed_RM: np.ndarray
    representatives_R: np.ndarray

    @property
    def neuron_index(self) -> np.ndarray:
        """The parent neuron of every row, shared first, then expert by expert; a permutation of all neurons."""
        return np.concatenate([self.shared, self.routed_RM.reshape(-1)]).astype(np.int32)


def profile(x_TD: torch.Tensor, mlp: GatedMLP, act: Activation, marks_per_token: int) -> Profile:
    """Profile one gated FFN on its inputs `x_TD`.

    Marks come from cosine activations: x normalised per token and every gate and up row normalised (in L2), the
    `marks_per_token` largest by absolute value.
    """
    gate_up = torch.cat([mlp.gate, mlp.up])
    unit_gate_up = F.normalize(gate_up, dim=-1)
    marks, mass_I = [], torch.zeros(mlp.width, dtype=torch.float64)
    for rows_TD in x_TD.split(CHUNK_TOKENS):
        cosine_TI = gated_hidden(F.normalize(rows_TD, dim=-1), unit_gate_up, act)
        marks.append(cosine_TI.abs().topk(marks_per_token, dim=-1).indices)
        mass_I += gated_hidden(rows_TD, gate_up, act).abs().double().sum(dim=0)
    marks_TK, num_tokens = torch.cat(marks), x_TD.shape[0]
    rate_I = torch.bincount(marks_TK.flatten(), minlength=mlp.width).double() / num_tokens
    return Profile(marks_TK, rate_I, mass_I / num_tokens * mlp.down.double().norm(dim=0))


def split_neurons(profile: Profile, cut: LayerCut, shared_by: str, max_iterations: int = 1) -> NeuronSplit:
    """Divide a layer's neurons: the shared ones by `shared_by` ("rate" or "contribution"), the rest clustered.

    The first centroids are the columns of the R remaining neurons of highest rate. Ties go to the lower neuron.
    """
    score_I = profile.rate_I if shared_by == "rate" else profile.contribution_I
    order = torch.argsort(score_I, descending=True, stable=True)
    shared = order[: cut.shared_width].sort().values
    candidates = order[cut.shared_width :].sort().values
    by_rate = torch.argsort(profile.rate_I[candidates], descending=True, stable=True)
    seeds = candidates[by_rate[: cut.num_routed]]
    clusters = cluster_marks(profile.marks_TK, candidates, seeds, max_iterations)
    ids = candidates.numpy()
    routed = np.stack([ids[clusters.labels_N == cluster] for cluster in range(cut.num_routed)])
    return NeuronSplit(shared.numpy(), routed, ids[clusters.representatives_R])
