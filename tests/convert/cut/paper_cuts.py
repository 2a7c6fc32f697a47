"""Helpers of the tests of CMoE's own recipe: a bare FFN, and the layer that the recipe makes of it.

Shape letters: T tokens, D hidden width, I neurons of the dense FFN.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig

from pregate.convert.cut.layer_cut import cut_one
from pregate.convert.cut.options import ConvertOptions
from pregate.model.config import RoutedConfig
from pregate.model.gated_mlp import GatedMLP
from pregate.model.layers import RoutedMLP

#: What the paper's text has in place of the released code's values.
PAPER_TEXT = {"gate": "representative-signed", "profile": "raw", "distance": "l2", "max_iterations": 4}


def gated_mlp(gate_ID: torch.Tensor, up_ID: torch.Tensor, down_DI: torch.Tensor) -> GatedMLP:
    return GatedMLP(0, nn.Module(), "mlp", nn.Module(), gate_ID, up_ID, down_DI)


def float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def weights_of(mlp: GatedMLP) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return float64(mlp.gate), float64(mlp.up), float64(mlp.down)


def cut_by_recipe(mlp: GatedMLP, x_TD: torch.Tensor, counts: tuple[int, int, int], method: dict[str, Any]) -> RoutedMLP:
    """The layer as the recipe cuts it; `counts`: experts, shared, active."""
    experts, shared, active = counts
    fields: dict[str, Any] = {"model": Path("m"), "out": Path("o"), "calibration": (Path("c.txt"),)}
    fields |= {"experts": experts, "shared": shared, "active": active}
    options = ConvertOptions(recipe="cmoe-paper", **(method), **fields)
    parent = LlamaConfig(hidden_size=x_TD.shape[1], intermediate_size=mlp.width, num_attention_heads=1)
    config = RoutedConfig(text_config=parent, gate=options.gate, selection=options.selection)
    return cut_one(mlp, x_TD, config, options)


def groups_of(routed: RoutedMLP) -> tuple[list[int], list[list[int]]]:
    """The shared neurons' ids, and each routed expert's."""
    index, width = routed.neuron_index.tolist(), routed.cut.shared_width
    size = routed.cut.expert_width
    return index[:width], [index[start : start + size] for start in range(width, len(index), size)]
