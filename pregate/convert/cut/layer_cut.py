"""Cutting one layer: from a dense FFN and the inputs it gets to a routed FFN, its gates fitted: the linear one by
closed-form regression, CMoE's from its representative neurons.

Shape letters: T tokens, D hidden width, R routed experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from pregate.convert.cut.capture import contributions, sample_rows, split_by_capture
from pregate.convert.cut.cmoe import (
    CHUNK_TOKENS,
    NeuronSplit,
    Profile,
    profile,
    representatives,
    shared_neurons,
    split_by_marks,
)
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.cut.ridge import CrossFit, Ridge
from pregate.kernels.reference import Activation, activation, threshold_for
from pregate.model.config import LayerCut, RoutedConfig
from pregate.model.gated_mlp import GatedMLP
from pregate.model.layers import RoutedMLP, weighted_mass


def cut_one(mlp: GatedMLP, x_TD: torch.Tensor, config: RoutedConfig, options: ConvertOptions) -> RoutedMLP:
    """Profile one FFN on its inputs, split its neurons, and make both gates (`options.gate` routes)."""
    act = activation(config.hidden_act)
    seen = profile(x_TD, mlp, act, options.marks_per_token, options.profile)
    if options.clustering == "marks":
        (cut,) = options.cuts(mlp.width)
        shared = shared_neurons(seen, cut.shared_width, options.shared_by)
        split = split_by_marks(seen, cut, shared, options.max_iterations, options.distance)
    else:
        cut, split = _capture(mlp, x_TD, seen, act, options)
    routed = cut_layer(mlp, split, cut, config)
    routed.neuron_score.copy_(seen.contribution_I[routed.neuron_index.long().cpu()])
    if cut.num_routed:
        fit_linear(routed, x_TD, options.intercept)
        set_representatives(routed, mlp, representatives(seen.marks_TK, split.routed_RM, options.distance))
    return routed


def _capture(
    mlp: GatedMLP, x_TD: torch.Tensor, seen: Profile, act: Activation, options: ConvertOptions
) -> tuple[LayerCut, NeuronSplit]:
    """The cut, of those allowed, that captures most contribution; of equals that with more shared experts."""
    rows_TD = sample_rows(x_TD)
    c_TI = contributions(rows_TD, mlp, act, options.token_power)
    fits = CrossFit(rows_TD, options.intercept)
    found: list[tuple[float, LayerCut, NeuronSplit]] = []
    for cut in reversed(options.cuts(mlp.width)):
        joint = options.shared_by == "capture"
        shared = None if joint else shared_neurons(seen, cut.shared_width, options.shared_by)
        split, captured = split_by_capture(fits, c_TI, cut, options.selection, shared)
        found.append((captured, cut, split))
    return max(found, key=lambda one: one[0])[1:]  # the first of equals


@torch.no_grad()
def cut_layer(mlp: GatedMLP, split: NeuronSplit, cut: LayerCut, config: RoutedConfig) -> RoutedMLP:
    """Regroup a dense FFN's rows as `split` says; the gates are left zero. No weight changes its value."""
    routed = RoutedMLP(mlp.layer, mlp.hidden_size, cut, config, hold_experts=True)
    routed.parent_width = mlp.width
    routed = routed.to(mlp.down.device)
    routed.neuron_index.copy_(torch.from_numpy(split.neuron_index))
    if routed.shared is not None:
        shared = torch.from_numpy(split.shared)
        routed.shared.gate_up_proj.copy_(torch.cat([mlp.gate[shared], mlp.up[shared]]))
        routed.shared.down_proj.copy_(mlp.down[:, shared])
    if routed.experts is not None:
        for expert, neurons in enumerate(torch.from_numpy(split.routed_RM)):
            routed.experts.gate_up_proj[expert].copy_(torch.cat([mlp.gate[neurons], mlp.up[neurons]]))
            routed.experts.down_proj[expert].copy_(mlp.down[:, neurons])
    return routed


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
