"""Fitting down projections anew, in closed form, to what the dense parent's FFN gives.

Under a routing, a layer leaves out the experts it does not choose, and what they would have added is lost. Much of it
can be told from the neurons that do run; so the least-squares fit of the dense output on those gives back a part of
it, without a gradient: (Z' Z + r) X = Z' Y with Z the hidden neurons times their experts' weights (0 where not chosen),
Y what is missing, and X what is added to the down projections. Each token's rows of Z and Y are scaled by one over the
size of its state and of what is missing: a state is normalised before the next layer reads it, so an error counts as
a share of it. (Without, a document's first token, whose state is a hundred times another's in large models, rules the
sums: docs/measurements.md.) The ridge r is the one that is best on a quarter of the text that the rest is fitted
without: little text has more neurons to fit than it tells of. Layer after layer, each on inputs that the layers before
it give after their own fit: a layer runs twice on the text, once to be fitted and once to go on.

Shape letters: B rows, N tokens, T tokens of all rows, D hidden width, M expert width, R routed experts, S routed
experts of all layers side by side, J neurons of a layer's shared and routed experts side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pregate.convert.files.skeleton import with_forward
from pregate.convert.paths.all_experts import routed_hidden
from pregate.convert.progress import Progress
from pregate.convert.text.batches import padded
from pregate.convert.tune.data import spaced_batches
from pregate.convert.tune.forward import TuningPass
from pregate.convert.tune.outputs import layers_by, path_offsets, path_scores
from pregate.kernels.reference import gated_hidden
from pregate.model.gated_mlp import decoder_layers, find_gated_mlps
from pregate.model.layers import RoutedMLP
from pregate.model.modeling import RoutedForCausalLM

#: Tokens fitted on.
REFIT_TOKENS = 32_768
#: Ridges to choose from, as shares of the mean diagonal of Z' Z; and one row of text in how many chooses.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
CHOOSES_EVERY = 4


@dataclass(frozen=True)
class _Sums:
    """Z' Z [J, J], Z' Y [J, D] and |Y|^2 over some tokens; of none, zeros."""

    gram_JJ: torch.Tensor
    cross_JD: torch.Tensor
    square: torch.Tensor

    @classmethod
    def of(cls, z_TJ: torch.Tensor, missing_TD: torch.Tensor) -> _Sums:
        return cls(z_TJ.T @ z_TJ, z_TJ.T @ missing_TD, missing_TD.square().sum())

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.gram_JJ + other.gram_JJ, self.cross_JD + other.cross_JD, self.square + other.square)

    def solve(self, ridge: float) -> torch.Tensor:
        """The change of down projections [J, D]."""
        least = ridge * self.gram_JJ.diagonal().mean().clamp_min(1e-12)
        return torch.linalg.solve(self.gram_JJ + least * torch.eye(len(self.gram_JJ)).to(self.gram_JJ), self.cross_JD)

    def left(self, change_JD: torch.Tensor) -> float:
        """The share of |Y|^2 that a change leaves."""
        gained = 2 * (change_JD * self.cross_JD).sum() - (change_JD * (self.gram_JJ @ change_JD)).sum()
        return float(1 - gained / self.square.clamp_min(1e-30))


@dataclass
class _Part:
    """A batch of rows on its way through the layers: `hidden_BND` enters the next one.

    `given` are the masks and positions the model has for each layer.
    """

    routing: _RefitPass
    hidden_BND: torch.Tensor
    given: list[tuple[tuple[Any, ...], dict[str, Any]]]

    @classmethod
    def of(cls, model: RoutedForCausalLM, rows: list[list[int]], layers: Sequence[nn.Module], first: int) -> _Part:
        """Rows, the first of them the fit's `first`, up to the first layer; the model is called with every layer giving
        its input on."""
        ids_BN, mask_BN = (t.to(model.device) for t in padded(rows))
        scores_TS = path_scores(model, ids_BN)
        held_T = path_offsets(model, scores_TS, ids_BN)
        routing = _RefitPass(model, mask_BN.flatten().bool(), scores_TS, {}, held_T)
        number_B1 = torch.arange(first, first + len(rows), device=ids_BN.device)[:, None]
        routing.chooses_T = ((number_B1 + 1) % CHOOSES_EVERY == 0).expand_as(ids_BN)[mask_BN.bool()]
        entering, given = [], []

        def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            entering.append(hidden_states)
            given.append((args, kwargs))
            return hidden_states

        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(with_forward(layer, record))
            model.parent.base_model(input_ids=ids_BN, use_cache=False)
        return cls(routing, entering[0].clone(), given)

    def run(self, model: RoutedForCausalLM, layers: Sequence[nn.Module], index: int) -> torch.Tensor:
        """What layer `index` gives for `hidden_BND`."""
        args, kwargs = self.given[index]
        self.routing.state_TD = self.hidden_BND.flatten(0, 1)
        with layers_by(model, self.routing):
            out = layers[index](self.hidden_BND, *args, **kwargs)
        return out if isinstance(out, torch.Tensor) else out[0]


@dataclass
class _RefitPass(TuningPass):
    """Runs layers as they are; in layer `fitted` takes the sums of the fit in place of it, every token scaled: of those
    fitted on, and of those, True in `chooses_T` (real tokens alone), that choose the ridge. `state_TD` enters the
    layer. `parent`: see `refit`.
    """

    fitted: int | None = None
    state_TD: torch.Tensor = field(init=False)
    chooses_T: torch.Tensor = field(init=False)
    parent: nn.Module | None = None
    sums: tuple[_Sums, _Sums] = field(init=False)

    def forward(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> torch.Tensor:
        if mlp.layer != self.fitted:
            return super().forward(mlp, x_TD)
        weights_TR = self._weights(mlp, x_TD, None)[self.real_T]
        z_TJ, missing_TD = _fit_of(mlp, x_TD[self.real_T], weights_TR, self.parent)
        scale_T1 = token_scale(self.state_TD[self.real_T], missing_TD)
        z_TJ, missing_TD = z_TJ * scale_T1, missing_TD * scale_T1
        fits_T = ~self.chooses_T
        self.sums = (
            _Sums.of(z_TJ[fits_T], missing_TD[fits_T]),
            _Sums.of(z_TJ[self.chooses_T], missing_TD[self.chooses_T]),
        )
        return torch.zeros_like(x_TD)  # is not looked at


def token_scale(state_TD: torch.Tensor, missing_TD: torch.Tensor) -> torch.Tensor:
    """What each token's rows are multiplied by [T, 1], float64: one over the norm of state and missing side by side.

    What is missing counts too, as in the layer in which a first token's state becomes large it is still small.

    Example: state [3, 0], missing [0, 4]: 1 / 5.
    """
    square_T1 = (state_TD.double().square() + missing_TD.square()).sum(dim=-1, keepdim=True)
    return square_T1.clamp_min(1e-30).rsqrt()


def _fit_of(
    mlp: RoutedMLP, x_TD: torch.Tensor, weights_TR: torch.Tensor, parent: nn.Module | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What there is to fit with and what is missing, float64."""
    assert mlp.experts is not None
    h_TRM = routed_hidden(mlp, x_TD)
    there_TRM = h_TRM * weights_TR[:, :, None]
    down_DS = mlp.experts.down_proj.transpose(0, 1).flatten(1)
    if parent is None:
        missing_TD = F.linear((h_TRM - there_TRM).flatten(1), down_DS)
    else:
        missing_TD = parent(x_TD[None])[0] - mlp.shared_output(x_TD) - F.linear(there_TRM.flatten(1), down_DS)
    shared = [] if mlp.shared is None else [gated_hidden(x_TD, mlp.shared.gate_up_proj, mlp.act)]
    return torch.cat([*shared, there_TRM.flatten(1)], dim=1).double(), missing_TD.double()


@torch.no_grad()
def refit(
    model: RoutedForCausalLM, rows: Sequence[list[int]], progress: Progress, parent: Any | None = None
) -> list[float]:
    """Fit the down projections of every routed layer, in place, on about `REFIT_TOKENS` of `rows`.

    What is missing is what the experts not chosen would add, in a model whose every expert together is the dense
    parent (where it is no partition, `parent` tells). Not for a tuned model. Returns per
    routed layer the share of the missing output's (scaled) square that is still missing, on the text fitted on.
    """
    layers = list(decoder_layers(model.parent))
    mlps = {m.layer: m for m in model.routed_mlps if 0 < m.cut.num_active < m.cut.num_routed}
    whole = {} if parent is None else {m.layer: m.module for m in find_gated_mlps(parent)}
    left: list[float] = []
    if not mlps:
        return left
    batches = spaced_batches(rows, REFIT_TOKENS)
    firsts = accumulate(map(len, batches), initial=0)
    parts = [_Part.of(model, batch, layers, first) for batch, first in zip(batches, firsts, strict=False)]
    with progress.stage("fitting down projections", (max(mlps) + 1) * len(parts)) as advance:
        for index in range(max(mlps) + 1):
            if index in mlps:
                fits = chooses = _Sums(*[torch.zeros((), dtype=torch.float64, device=model.device)] * 3)
                for part in parts:
                    part.routing.fitted, part.routing.parent = index, whole.get(index)
                    part.run(model, layers, index)
                    fits, chooses = fits + part.routing.sums[0], chooses + part.routing.sums[1]
                    part.routing.fitted = None
                left.append(_fit(mlps[index], fits, chooses))
            for part in parts:
                if index < max(mlps):
                    part.hidden_BND = part.run(model, layers, index)
                advance(1)
    return left


def _fit(mlp: RoutedMLP, fits: _Sums, chooses: _Sums) -> float:
    """Add the fit to a layer's down projections; returns the share of what is missing that stays.

    The ridge is the one that leaves least of the text it was not fitted with; then all of it is fitted.
    """
    assert mlp.experts is not None
    ridge = min(RIDGES, key=lambda ridge: chooses.left(fits.solve(ridge)))
    both = fits + chooses
    change_JD, width = both.solve(ridge), mlp.cut.shared_width
    if mlp.shared is not None:
        _add_to(mlp.shared, change_JD[:width].T)
    by_expert_RMD = change_JD[width:].unflatten(0, (mlp.cut.num_routed, -1))
    _add_to(mlp.experts, by_expert_RMD.transpose(1, 2))
    return both.left(change_JD)


def _add_to(module: Any, change: torch.Tensor) -> None:
    """Add to a module's down projections: to those behind a low-rank change, where there is one."""
    low_rank = getattr(module, "parametrizations", None)
    held = module.down_proj if low_rank is None else low_rank.down_proj.original
    held.data += change.to(held)
