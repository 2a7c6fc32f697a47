"""Numbering experts so that those of one number run for the same tokens in all layers.

Which number an expert bears means nothing to a gate per layer, and everything to a path router that gives one index
for all layers (Read-ME, section 3.1, whose experts share a number because they come from the same domain).

Shape letters: T tokens, L layers, R routed experts of every layer, S = L * R, M expert width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from pregate.convert.cut.assignment import balanced_assignment
from pregate.convert.paths.targets import MassScale, TargetPool
from pregate.model.layers import RoutedMLP
from pregate.model.modeling import RoutedForCausalLM

#: Passes over the layers; each may only raise the sum of correlations, and few are needed.
_MAX_PASSES = 20


def align_experts(model: RoutedForCausalLM, pool: TargetPool) -> TargetPool:
    """Renumber the experts of `model` in place by what they contribute to the pool; returns the pool renumbered."""
    cuts, training = model.config.cuts, torch.cat(pool.training().mass)
    layers = [mlp for mlp in model.routed_mlps if mlp.cut.num_routed]
    targets_TS = MassScale.of(training, cuts).targets(training, cuts, model.config.selection)
    orders = aligned_orders(targets_TS, len(layers))
    for mlp, order in zip(layers, orders, strict=True):
        renumber(mlp, order)
    num_routed = orders.shape[1]
    column_S = torch.from_numpy((orders + num_routed * np.arange(len(layers))[:, None]).reshape(-1))
    return replace(pool, mass=[mass[:, column_S] for mass in pool.mass])


def aligned_orders(target_TS: torch.Tensor, num_layers: int) -> np.ndarray:
    """Return int64 [L, R]: expert `order[l, r]` of layer l is to be number r.

    `target_TS` is what experts contribute (`MassScale.targets`), layer by layer. Maximises the sum, over all pairs of
    layers, of the correlations of equal numbers, one layer at a time (each an exact assignment) until none changes:
    a local optimum. ValueError: S is no multiple of `num_layers`.

    Example: two layers of two experts, where expert 0 of the second runs when expert 1 of the first does:
    [[0, 1], [1, 0]].
    """
    if target_TS.shape[1] % num_layers:
        raise ValueError(f"{target_TS.shape[1]} experts in {num_layers} layers: every layer needs as many")
    num_routed = target_TS.shape[1] // num_layers
    centred_TS = target_TS.double() - target_TS.double().mean(dim=0)
    scaled_TS = centred_TS / centred_TS.norm(dim=0).clamp_min(1e-12)
    correlation_SS = (scaled_TS.T @ scaled_TS).numpy().reshape(num_layers, num_routed, num_layers, num_routed)
    orders = np.tile(np.arange(num_routed), (num_layers, 1))
    for number in range(_MAX_PASSES):
        before = orders.copy()
        for layer in range(num_layers):
            # The first time round each layer follows those before it, which have their numbers already.
            others = [n for n in range(num_layers if number else layer) if n != layer]
            gain_RR = sum((correlation_SS[layer][:, n, orders[n]] for n in others), np.zeros((num_routed, num_routed)))
            number_R = balanced_assignment(-gain_RR, 1)
            orders[layer] = np.argsort(number_R)
        if number and (orders == before).all():
            break
    return orders


@torch.no_grad()
def renumber(mlp: RoutedMLP, order: Sequence[int] | np.ndarray) -> None:
    """Give expert `order[r]` of `mlp` the number r, with all that belongs to it; what the layer computes stays."""
    order_R = torch.as_tensor(np.asarray(order), dtype=torch.int64, device=mlp.neuron_index.device)
    experts, linear, paper = mlp.experts, mlp.linear_gate, mlp.paper_gate
    assert experts is not None
    assert linear is not None
    assert paper is not None
    for tensor in (experts.gate_up_proj, experts.down_proj, linear.weight, linear.bias, paper.scale):
        tensor.copy_(tensor[order_R].clone())
    paper.balance_bias.copy_(paper.balance_bias[order_R].clone())
    pairs = paper.weight.unflatten(0, (2, -1))  # gate rows, then up rows
    pairs.copy_(pairs[:, order_R].clone())
    for rows in (mlp.neuron_index, mlp.neuron_score):
        routed_RM = rows[mlp.cut.shared_width :].unflatten(0, (mlp.cut.num_routed, mlp.cut.expert_width))
        routed_RM.copy_(routed_RM[order_R].clone())
