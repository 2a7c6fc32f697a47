"""Cutting one layer: from a dense FFN and the inputs it gets to a routed FFN.

Shape letters: T tokens, D hidden width.
"""

from __future__ import annotations

import torch

from pregate.convert.assembly import cut_layer
from pregate.convert.cmoe import profile, split_neurons
from pregate.convert.gates import fit_linear, set_representatives
from pregate.convert.options import ConvertOptions
from pregate.kernels.reference import activation
from pregate.model.config import RoutedConfig
from pregate.model.gated_mlp import GatedMLP
from pregate.model.layers import RoutedMLP


def cut_one(mlp: GatedMLP, x_TD: torch.Tensor, config: RoutedConfig, options: ConvertOptions) -> RoutedMLP:
    """Profile one FFN on its inputs, split its neurons, and fit the gate."""
    cut, act = options.cut(mlp.width), config.hidden_act
    seen = profile(x_TD, mlp, activation(act), options.marks_per_token)
    split = split_neurons(seen, cut, options.shared_by, options.max_iterations)
    routed = cut_layer(mlp, split, cut, act, options.gate)
    if options.gate == "linear":
        fit_linear(routed, x_TD)
    else:
        set_representatives(routed, mlp, split.representatives_R)
    return routed
