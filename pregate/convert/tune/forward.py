"""The forward pass of tuning: a routed layer computed densely, each expert times the weight its routing gives it.

A router that learns needs every expert: the gradient of a choice is what each would have added, and contribution
masses, which it forecasts, are of all. Two large products give them. With the router at rest, and without gradients,
each expert runs on the tokens that chose it alone: at 2,048 tokens of SmolLM2's width 0.7, 0.4 and 0.3 of the time at
75, 50 and 25 % active. The output is what the reference gives, up to the order of addition.

Data on its way: x [T, D] -> h of all experts [T, R, M] -> weights [T, R], 0 where the routing leaves an expert out
-> h times weight -> [T, D].

Shape letters: T tokens of all rows (padding included), D hidden width, M expert width, R routed experts, S routed
experts of all layers side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from pregate.convert.paths.all_experts import add_chosen, add_weighted, masses, routed_hidden
from pregate.convert.paths.targets import MassScale
from pregate.convert.tune.straight_through import soft_choice, straight_through
from pregate.kernels.reference import chosen_by, threshold_for
from pregate.model.gates import LinearGate, RepresentativeGate
from pregate.model.layers import RoutedMLP
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import split_layers


@dataclass
class TuningPass:
    """A `FastPath` that lives for one forward pass. `real_T` False at padding; `scores_TS` the path router's scores,
    `offset_T` what is added to them before a threshold chooses (`path_offsets`).

    Beside its output it gathers `mass` errors of the router's scores as forecasts, and `balance` terms. With
    `calibrate` the thresholds of each layer's gate and oracle are set from the tokens of the pass on its way (a path
    router's are not: it needs no pass for them). Without `straight_through` the choice of experts has no gradient.

    `offsets`: what balancing has added to each layer's scores [R], which is not a forecast's to learn. Afterwards
    `loads` holds each layer's tokens per expert [R], `limits` the threshold that would have been right for this
    batch, `spreads` the standard deviation of its scores, `mass_errors` and `balance_terms` one term per layer, of the
    first time it ran: with `checkpointed` a layer runs once more on the way back.
    """

    model: RoutedForCausalLM
    real_T: torch.Tensor
    scores_TS: torch.Tensor | None
    offsets: dict[int, torch.Tensor]
    offset_T: torch.Tensor | None = None
    mass: bool = False
    balance: bool = False
    calibrate: bool = False
    straight_through: bool = True
    loads: dict[int, torch.Tensor] = field(init=False, default_factory=dict)
    limits: dict[int, torch.Tensor] = field(init=False, default_factory=dict)
    spreads: dict[int, torch.Tensor] = field(init=False, default_factory=dict)
    mass_errors: dict[int, torch.Tensor] = field(init=False, default_factory=dict)
    balance_terms: dict[int, torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._num_real = int(self.real_T.sum())
        router, cuts = self.model.path_router, self.model.config.cuts
        if self.scores_TS is not None and router is not None:
            self._split = split_layers(self.scores_TS, cuts)
            weights_TS = router.expert_weights(self.scores_TS)
            self._path_weights = None if weights_TS is None else split_layers(weights_TS, cuts)

    def forward(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> torch.Tensor:
        out_TD = mlp.shared_output(x_TD)
        if mlp.experts is None or mlp.cut.num_active == 0:
            return out_TD
        if not (self.mass or self.calibrate):
            with torch.autocast(x_TD.device.type, enabled=False):
                weights_TR = self._weights(mlp, x_TD, None)
            if not weights_TR.requires_grad:
                return add_chosen(mlp, out_TD, x_TD, weights_TR)
            return add_weighted(out_TD, routed_hidden(mlp, x_TD), weights_TR, mlp.experts.down_proj)
        down, h_TRM = mlp.experts.down_proj, routed_hidden(mlp, x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            weights_TR = self._weights(mlp, x_TD, masses(h_TRM, down, mlp.token_power))
        return add_weighted(out_TD, h_TRM, weights_TR, down)

    def _weights(self, mlp: RoutedMLP, x_TD: torch.Tensor, mass_TR: torch.Tensor | None) -> torch.Tensor:
        """The weights [T, R] of the routing in use, with a gradient to what it chose by."""
        gate, num_active = mlp.gate, mlp.cut.num_active
        if self.scores_TS is None and isinstance(gate, RepresentativeGate):
            shares_TR = gate(x_TD.float()).softmax(dim=-1)
            chosen_TR = chosen_by(shares_TR + gate.balance_bias, num_active, None)
            self._note(mlp, shares_TR, chosen_TR, None, None)
            weights_TR = straight_through(shares_TR, chosen_TR, num_active, None, self.straight_through)
            return weights_TR * (1 + shares_TR * gate.scale)
        # A gate's input is detached: the backbone learns from the losses, not from the router's noise.
        scores_TR = gate(x_TD.detach().float()) if self.scores_TS is None else self._split[mlp.layer]
        threshold = self._threshold(mlp, scores_TR, mass_TR)
        choosing_TR = scores_TR if self.offset_T is None else scores_TR + self.offset_T[:, None]
        chosen_TR = chosen_by(choosing_TR.detach(), num_active, threshold)
        self._note(mlp, scores_TR, chosen_TR, threshold, mass_TR)
        weights_TR = straight_through(choosing_TR, chosen_TR, num_active, threshold, self.straight_through)
        if self.scores_TS is None or self._path_weights is None:
            return weights_TR
        return weights_TR * self._path_weights[mlp.layer]

    @torch.no_grad()
    def _threshold(self, mlp: RoutedMLP, scores_TR: torch.Tensor, mass_TR: torch.Tensor | None) -> torch.Tensor | None:
        """The threshold in use, a copy, as it moves after the step; None where a fixed number is chosen."""
        if mlp.selection != "threshold":
            return None
        held = threshold_of(self.model, mlp)
        limit = threshold_for(scores_TR[self.real_T], mlp.cut.num_active)
        self.limits[mlp.layer] = limit
        if self.calibrate and self.scores_TS is None:
            held.copy_(limit)
        if self.calibrate and mass_TR is not None:
            mlp.mass_threshold.copy_(threshold_for(mass_TR[self.real_T], mlp.cut.num_active))
        return held.clone()

    def _note(
        self,
        mlp: RoutedMLP,
        scores_TR: torch.Tensor,
        chosen_TR: torch.Tensor,
        threshold: torch.Tensor | None,
        mass_TR: torch.Tensor | None,
    ) -> None:
        """Keep what is to be gathered of a layer."""
        self.loads[mlp.layer] = chosen_TR[self.real_T].sum(dim=0).double()
        self.spreads[mlp.layer] = scores_TR.detach()[self.real_T].std(correction=0)
        if self.mass and mass_TR is not None:
            error = self._mass_error(mlp, scores_TR[self.real_T], mass_TR[self.real_T])
            self.mass_errors.setdefault(mlp.layer, error)
        if self.balance:
            soft_R = soft_choice(scores_TR, mlp.cut.num_active, threshold)[self.real_T].mean(dim=0)
            self.balance_terms.setdefault(mlp.layer, balance_term(self.loads[mlp.layer].float(), soft_R))

    def _mass_error(self, mlp: RoutedMLP, scores_TR: torch.Tensor, mass_TR: torch.Tensor) -> torch.Tensor:
        """Squared error of scores as forecasts of masses, as a share of what is to be forecast's variance."""
        target_TR, cuts = mass_TR, [mlp.cut]
        if self.scores_TS is not None:
            target_TR = MassScale.of(mass_TR, cuts).targets(mass_TR, cuts, mlp.selection)
        variance = target_TR.var().clamp_min(1e-12)
        if mlp.layer in self.offsets:
            target_TR = target_TR + self.offsets[mlp.layer]
        return F.mse_loss(scores_TR, target_TR) / variance

    @property
    def active_neurons(self) -> float:
        """FFN neurons that the real tokens ran, over all layers."""
        total = 0.0
        for mlp in self.model.routed_mlps:
            picks = self.loads[mlp.layer].sum().item() if mlp.layer in self.loads else 0.0
            total += self._num_real * mlp.cut.shared_width + picks * mlp.cut.expert_width
        return total

    @property
    def all_neurons(self) -> int:
        return self._num_real * sum(mlp.parent_width for mlp in self.model.routed_mlps)


def threshold_of(model: RoutedForCausalLM, mlp: RoutedMLP) -> torch.Tensor:
    """The threshold a layer's experts are chosen by, where it lies (a scalar view)."""
    if (router := model.deciding_router) is not None:
        return router.thresholds[mlp.layer]
    assert isinstance(mlp.gate, LinearGate)
    return mlp.gate.threshold


def forecasts_masses(model: RoutedForCausalLM) -> bool:
    """Whether the router in use was fitted so that its scores forecast masses, and may be kept to that."""
    if (router := model.deciding_router) is None:
        return model.config.gate == "linear"
    made = {} if model.manifest is None else model.manifest.options.get("decouple", {})
    return router.config.gate == "scores" and made.get("target", "mass") in ("mass", "relative")


def balance_term(loads_R: torch.Tensor, soft_R: torch.Tensor) -> torch.Tensor:
    """Switch's auxiliary loss (Fedus et al. 2021, equation 4): R times the sum of load share times soft share.

    1 where all experts are used alike. Example: loads [3, 1], soft [0.3, 0.1]: 2 (0.75 * 0.75 + 0.25 * 0.25) = 1.25.
    """
    return len(loads_R) * (loads_R / loads_R.sum().clamp_min(1) * (soft_R / soft_R.sum().clamp_min(1e-12))).sum()
