"""Cutting an FFN so that the experts a gate chooses capture as much contribution as they can.

A neuron's contribution at a token is |h_i| times the norm of its down column. An expert is worth running where its
neurons contribute; so a neuron belongs to the expert that runs when it contributes most. (Contributions are divided
by a power of the token's sum, lest a few tokens of large activations rule the cut.) Which expert runs when is for
the gate to say. Hence three steps in turn: fit a linear gate to the experts' masses, take the sets it chooses,
assign every neuron anew to where those sets capture most of its contribution. The shared expert takes part as one
that always runs, so shared neurons are not those that contribute most but those that lose most by being routed.

Data on its way: x [T, D] -> a sample of rows -> contributions c [T, I] -> labels [I] -> masses [T, R] -> gate scores
[T, R] -> sets [T, R] -> benefits c' sets [I, R], and c' 1 for the shared columns -> labels [I].

Shape letters: T tokens sampled, D hidden width, I neurons, E experts, S shared and R routed ones, M expert width.
"""

from __future__ import annotations

import numpy as np
import torch

from pregate.convert.cut.assignment import balanced_assignment
from pregate.convert.cut.cmoe import CHUNK_TOKENS, NeuronSplit
from pregate.convert.cut.ridge import CrossFit
from pregate.kernels.reference import Activation, choose_sets
from pregate.model.config import LayerCut
from pregate.model.gated_mlp import GatedMLP
from pregate.model.layers import by_token_power

#: Rows the cut is made on: bounds c [T, I] in memory, whatever the calibration text.
SAMPLE_TOKENS = 8192
#: Rounds of gate, sets and assignment; the best counts.
ROUNDS = 6


def contributions(x_TD: torch.Tensor, mlp: GatedMLP, act: Activation, token_power: float = 0.0) -> torch.Tensor:
    """|h_i| times the norm of down column i, divided by a power of the token's sum; float32 [T, I]."""
    norm_I = mlp.down.norm(dim=0)
    c_TI = torch.empty(x_TD.shape[0], mlp.width, device=x_TD.device)
    for c_rows, rows in zip(c_TI.split(CHUNK_TOKENS), x_TD.split(CHUNK_TOKENS), strict=True):
        raw_TI = mlp.hidden(rows, act).abs_().mul_(norm_I)
        c_rows.copy_(by_token_power(raw_TI, raw_TI.sum(dim=-1, keepdim=True), token_power))
    return c_TI


def sample_rows(x_TD: torch.Tensor, num_rows: int = SAMPLE_TOKENS) -> torch.Tensor:
    """At most `num_rows` rows, evenly spaced."""
    total = x_TD.shape[0]
    if total <= num_rows:
        return x_TD
    return x_TD[torch.arange(num_rows, device=x_TD.device) * total // num_rows]


def split_by_capture(
    fits: CrossFit,
    c_TI: torch.Tensor,
    cut: LayerCut,
    selection: str,
    shared: np.ndarray | None = None,
    rounds: int = ROUNDS,
) -> tuple[NeuronSplit, float]:
    """Divide a layer's neurons; returns the split of the best round and the share of contribution it captures.

    `fits` are of the inputs [T, D] of the same rows as `c_TI`. A row's sets come from the fit that has not seen it.
    `shared`, ids of the shared neurons, if they are chosen already.
    """
    total_I, experts_R = c_TI.sum(dim=0), torch.arange(cut.num_routed, device=c_TI.device)
    labels_I = _first_labels(total_I, cut, shared)
    best, best_captured = labels_I, -1.0
    for _ in range(rounds):
        is_in_IR = (labels_I[:, None] == experts_R).float()  # a zero row for a shared neuron
        mass_TR = c_TI @ is_in_IR
        sets_TR = choose_sets(fits.scores(mass_TR), cut.num_active, selection)
        captured = float((mass_TR * sets_TR).double().sum() + total_I[labels_I < 0].double().sum())
        if captured > best_captured:
            best, best_captured = labels_I, captured
        labels_I = _assign(c_TI.T @ sets_TR.to(c_TI.dtype), total_I, cut, shared)
        if torch.equal(labels_I, best):
            break
    labels = best.cpu().numpy()
    routed_RM = np.stack([np.flatnonzero(labels == expert) for expert in range(cut.num_routed)])
    split = NeuronSplit(np.flatnonzero(labels < 0), routed_RM)
    return split, best_captured / float(total_I.double().sum().clamp_min(1e-30))


def _first_labels(total_I: torch.Tensor, cut: LayerCut, shared: np.ndarray | None) -> torch.Tensor:
    """Labels [I] to start from: the strongest neurons shared (-1), the rest dealt out in turn by strength."""
    order = torch.argsort(total_I, descending=True, stable=True)
    labels_I = torch.full_like(order, -1)
    if shared is None:
        routed = order[cut.shared_width :]
    else:
        routed = order[~torch.isin(order, torch.from_numpy(shared).to(order.device))]
    labels_I[routed] = torch.arange(len(routed), device=order.device) % cut.num_routed
    return labels_I


def _assign(benefit_IR: torch.Tensor, total_I: torch.Tensor, cut: LayerCut, shared: np.ndarray | None) -> torch.Tensor:
    """Labels [I] of greatest benefit, `expert_width` neurons to each routed expert, the rest shared."""
    benefit = benefit_IR.double().cpu().numpy()
    labels = np.full(len(benefit), -1)
    if shared is not None:
        routed = np.setdiff1d(np.arange(len(benefit)), shared)
        labels[routed] = balanced_assignment(-benefit[routed], cut.expert_width)
    else:
        always = np.repeat(total_I.double().cpu().numpy()[:, None], cut.num_shared, axis=1)
        labels = balanced_assignment(-np.concatenate([always, benefit], axis=1), cut.expert_width) - cut.num_shared
    return torch.from_numpy(np.maximum(labels, -1)).to(benefit_IR.device)
