"""Cutting one layer: from a dense FFN and the inputs it gets to a routed FFN.

Shape letters: T tokens, D hidden width.
"""

from __future__ import annotations

import torch

from pregate.convert.assembly import cut_layer
from pregate.convert.capture import contributions, sample_rows, split_by_capture
from pregate.convert.clustering import representatives
from pregate.convert.cmoe import NeuronSplit, Profile, profile, shared_neurons, split_by_marks
from pregate.convert.gates import fit_linear, set_representatives
from pregate.convert.options import ConvertOptions
from pregate.kernels.reference import activation
from pregate.model.config import LayerCut, RoutedConfig
from pregate.model.gated_mlp import GatedMLP
from pregate.model.layers import RoutedMLP


def cut_one(mlp: GatedMLP, x_TD: torch.Tensor, config: RoutedConfig, options: ConvertOptions) -> RoutedMLP:
    """Profile one FFN on its inputs, split its neurons, and make both gates (`options.gate` is in force)."""
    cut, act = config.cuts[mlp.layer], activation(config.hidden_act)
    seen = profile(x_TD, mlp, act, options.marks_per_token, options.profile)
    split = _split(mlp, x_TD, seen, cut, config, options)
    routed = cut_layer(mlp, split, cut, config)
    routed.neuron_score.copy_(seen.contribution_I[routed.neuron_index.long().cpu()])
    fit_linear(routed, x_TD, options.intercept)
    set_representatives(routed, mlp, representatives(seen.marks_TK, split.routed_RM, options.distance))
    return routed


def _split(
    mlp: GatedMLP, x_TD: torch.Tensor, seen: Profile, cut: LayerCut, config: RoutedConfig, options: ConvertOptions
) -> NeuronSplit:
    joint = options.shared_by == "capture"
    shared = None if joint else shared_neurons(seen, cut.shared_width, options.shared_by)
    if options.clustering == "marks":
        assert shared is not None
        return split_by_marks(seen, cut, shared, options.max_iterations, options.distance)
    rows_TD = sample_rows(x_TD)
    c_TI = contributions(rows_TD, mlp, activation(config.hidden_act))
    return split_by_capture(rows_TD, c_TI, cut, options.selection, shared)
