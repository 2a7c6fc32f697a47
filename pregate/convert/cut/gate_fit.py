"""Fitting a layer's gates: the linear one by closed-form regression, CMoE's from its representative neurons.

Shape letters: T tokens, D hidden width, R routed experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from pregate.convert.cut.cmoe import CHUNK_TOKENS
from pregate.convert.cut.ridge import Ridge
from pregate.kernels.reference import threshold_for
from pregate.model.gated_mlp import GatedMLP
from pregate.model.layers import RoutedMLP, weighted_mass


@torch.no_grad()
def fit_linear(routed: RoutedMLP, x_TD: torch.Tensor, intercept: bool = True) -> None:
    """Fit the layer's linear gate from its FFN inputs to each expert's weighted contribution mass; no gradient steps.

    Its threshold, and the oracle's, are set so that `num_active` experts score as much per token, on average.
    """
    gate = routed.linear_gate
    assert gate is not None
    mass_TR = torch.cat([weighted_mass(routed, rows) for rows in x_TD.split(CHUNK_TOKENS)])
    weight_RD, bias_R = Ridge(x_TD, intercept).fit(mass_TR)
    gate.weight.copy_(weight_RD)
    gate.bias.copy_(bias_R)
    gate.threshold.copy_(threshold_for(gate(x_TD), routed.cut.num_active))
    routed.mass_threshold.copy_(threshold_for(mass_TR, routed.cut.num_active))


@torch.no_grad()
def set_representatives(routed: RoutedMLP, mlp: GatedMLP, representatives_R: np.ndarray) -> None:
    """Set CMoE's gate: the gate rows, then up rows, of one neuron per expert; L2-normalised unless it is signed."""
    gate = routed.paper_gate
    assert gate is not None
    neurons = torch.from_numpy(representatives_R).to(mlp.gate.device)
    rows = torch.cat([mlp.gate[neurons], mlp.up[neurons]])
    gate.weight.copy_(rows if gate.signed else F.normalize(rows, dim=-1))
