"""Even use of experts while tuning, and thresholds that keep the number of active experts where it belongs.

Shape letters: T tokens, R routed experts of a layer, S the routed experts of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pregate.base.errors import UserError
from pregate.convert.progress import Progress
from pregate.convert.text.batches import padded
from pregate.convert.tune.data import spaced, spaced_batches
from pregate.convert.tune.forward import TuningPass, threshold_of
from pregate.convert.tune.outputs import path_offsets, path_scores, run_layers
from pregate.model.gates import RepresentativeGate
from pregate.model.layers import RoutedMLP
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import put_thresholds

#: How far a threshold moves to the batch's own after each step.
THRESHOLD_RATE = 0.1
#: Tokens thresholds are set on: by a path router alone, and where a forward pass of the model is needed.
ROUTER_TOKENS = 65_536
FORWARD_TOKENS = 8192


def check_biases(model: RoutedForCausalLM) -> None:
    """UserError for a path router that has no bias for each layer's each expert."""
    router = model.deciding_router
    if router is not None and ((shape := router.config).gate == "dselect" or shape.heads == "single"):
        reason = f"a path router with {shape.gate} gate and {shape.heads} heads has no bias per expert"
        raise UserError.of("--balance", "bias", f"{reason}; allowed: none, loss")


def bias_of(model: RoutedForCausalLM, mlp: RoutedMLP) -> torch.Tensor:
    """What is added to a layer's scores [R], where it lies (a view)."""
    if (router := model.deciding_router) is not None:
        heads: Any = router.heads
        start = sum(c.num_routed for c in model.config.cuts[: mlp.layer])
        bias_S = heads.bias if isinstance(heads, nn.Linear) else heads.output.bias
        return bias_S.data[start : start + mlp.cut.num_routed]
    gate: Any = mlp.gate  # no read gate, whose checkpoints are not tuned
    return gate.balance_bias if isinstance(gate, RepresentativeGate) else gate.bias.data


@torch.no_grad()
def move_biases(
    model: RoutedForCausalLM,
    loads: dict[int, torch.Tensor],
    spreads: dict[int, torch.Tensor],
    rate: float,
    offsets: dict[int, torch.Tensor],
) -> None:
    """Add `rate` to the bias of each expert used less than its layer's mean, take it from one used more.

    (CMoE, section 3.4.) A representative gate's bias is in units of its softmax shares, as there; another router's
    in those of its scores' standard deviation. `offsets` keeps the sum of what was added.
    """
    for mlp in model.routed_mlps:
        if mlp.layer not in loads:
            continue
        loads_R = loads[mlp.layer]
        by_share = model.config.routing != "path" and isinstance(mlp.gate, RepresentativeGate)
        unit = 1.0 if by_share else spreads[mlp.layer]
        change_R = (rate * unit * torch.sign(loads_R.mean() - loads_R)).float()
        bias_of(model, mlp).add_(change_R)
        offsets[mlp.layer] = offsets.get(mlp.layer, torch.zeros_like(change_R)) + change_R


@torch.no_grad()
def follow_thresholds(model: RoutedForCausalLM, limits: dict[int, torch.Tensor]) -> None:
    """Move each threshold a little towards `limits`, what would have been right for the last batch."""
    for mlp in model.routed_mlps:
        if mlp.layer in limits and limits[mlp.layer].isfinite():
            held = threshold_of(model, mlp)
            held.lerp_(limits[mlp.layer].to(held.dtype), THRESHOLD_RATE)


@torch.no_grad()
def set_thresholds(model: RoutedForCausalLM, rows: Sequence[list[int]], progress: Progress) -> None:
    """Set every threshold so that the mean number of experts on (a part of) `rows` is the layer's `num_active`."""
    if model.config.selection != "threshold":
        return
    if (router := model.deciding_router) is None:
        calibrate(model, rows, progress)
        return
    parts, groups = [], spaced_batches(rows, ROUTER_TOKENS)
    with progress.stage("setting thresholds (rows)", sum(map(len, groups))) as advance:
        for group in groups:
            ids_BN, mask_BN = (t.to(model.device) for t in padded(group))
            scores_TS = path_scores(model, ids_BN)
            assert scores_TS is not None
            parts.append(scores_TS[mask_BN.flatten().bool()])
            advance(len(group))
    put_thresholds(router, torch.cat(parts), [cut.num_active for cut in model.config.cuts])


@torch.no_grad()
def calibrate(model: RoutedForCausalLM, rows: Sequence[list[int]], progress: Progress) -> None:
    """Set the thresholds of layers' gates, and of their oracles, layer after layer in one forward pass.

    So each layer's is set on what the layers before it give with theirs.
    """
    ids_BN, mask_BN = (t.to(model.device) for t in padded(spaced(rows, FORWARD_TOKENS)))
    scores_TS, real_T = path_scores(model, ids_BN), mask_BN.flatten().bool()
    mlps = model.routed_mlps
    with progress.stage("setting thresholds (layers)", len(mlps)) as advance:
        hooks = [mlp.register_forward_hook(lambda *_: advance(1)) for mlp in mlps]
        try:
            held_T = path_offsets(model, scores_TS, ids_BN)
            run_layers(model, ids_BN, TuningPass(model, real_T, scores_TS, {}, held_T, calibrate=True))
        finally:
            for hook in hooks:
                hook.remove()
