"""Fitting a layer's gate: the paper's representative neurons, or a closed-form linear regression.

Shape letters: T tokens, D hidden width, R routed experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from pregate.convert.cmoe import CHUNK_TOKENS
from pregate.model.gated_mlp import GatedMLP
from pregate.model.layers import RoutedMLP, contribution_mass

#: Ridge strength relative to the mean diagonal of the inputs' covariance.
RIDGE = 1e-3


def ridge(x_TD: torch.Tensor, y_TR: torch.Tensor, strength: float = RIDGE) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares from `x_TD` with intercept to `y_TR` with a ridge penalty on the slopes; float64 throughout.

    Returns weight [R, D] and bias [R]. The penalty is `strength` times the mean variance of the inputs.
    """
    x_TD, y_TR = x_TD.double(), y_TR.double()
    x_mean, y_mean = x_TD.mean(dim=0), y_TR.mean(dim=0)
    x_TD, y_TR = x_TD - x_mean, y_TR - y_mean
    gram_DD = x_TD.T @ x_TD
    gram_DD.diagonal().add_(strength * gram_DD.diagonal().mean())
    weight_RD = torch.linalg.solve(gram_DD, x_TD.T @ y_TR).T
    return weight_RD, y_mean - weight_RD @ x_mean


@torch.no_grad()
def fit_linear(routed: RoutedMLP, x_TD: torch.Tensor) -> None:
    """Fit the layer's linear gate from its FFN inputs to each expert's contribution mass; no gradient steps."""
    assert routed.gate is not None
    assert routed.gate.bias is not None
    mass_TR = torch.cat([contribution_mass(routed, rows) for rows in x_TD.split(CHUNK_TOKENS)])
    weight_RD, bias_R = ridge(x_TD, mass_TR)
    routed.gate.weight.copy_(weight_RD)
    routed.gate.bias.copy_(bias_R)


@torch.no_grad()
def set_representatives(routed: RoutedMLP, mlp: GatedMLP, representatives_R: np.ndarray) -> None:
    """Set CMoE's gate: the L2-normalised gate rows, then up rows, of one neuron per expert."""
    assert routed.gate is not None
    neurons = torch.from_numpy(representatives_R)
    rows = torch.cat([mlp.gate[neurons], mlp.up[neurons]])
    routed.gate.weight.copy_(F.normalize(rows, dim=-1))
