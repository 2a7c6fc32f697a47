"""A layer's gates: scores of its routed experts from its FFN input, and the experts those scores choose.

Gates are stored and loaded in float32 whatever the weights are in: they are tiny, and last bits of a score decide.
Shape letters: T tokens, D hidden width, R routed experts, K experts of a token (at most).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from pregate.kernels import reference
from pregate.model.config import LayerCut


class Choice(NamedTuple):
    """Experts of T tokens: `ids` int64 [T, K], ascending, -1 padding last; `weights` [T, K], or None when all are 1."""

    ids: torch.Tensor
    weights: torch.Tensor | None = None


class LinearGate(nn.Module):
    """Scores x W' + b, fitted in closed form to each expert's contribution mass (the notes on CMoE, section 5.3).

    `selection` "top_k": the `num_active` highest. "threshold": every expert that scores `threshold` or more, so that
    a token has 0 to R experts; the threshold was set so that their mean on the calibration text is `num_active`.
    """

    threshold: torch.Tensor

    def __init__(self, hidden_size: int, cut: LayerCut, selection: str) -> None:
        super().__init__()
        self.num_active, self.selection = cut.num_active, selection
        self.weight = nn.Parameter(torch.zeros(cut.num_routed, hidden_size))
        self.bias = nn.Parameter(torch.zeros(cut.num_routed))
        self.register_buffer("threshold", torch.zeros(()), persistent=selection == "threshold")

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Scores [T, R] in the gate's own type."""
        return F.linear(x_TD.to(self.weight.dtype), self.weight, self.bias)

    def ranking(self, x_TD: torch.Tensor) -> torch.Tensor:
        """What the choice goes by [T, R]."""
        return self(x_TD)

    @property
    def limit(self) -> torch.Tensor | None:
        """The threshold; None where a fixed number of experts is chosen."""
        return self.threshold if self.selection == "threshold" else None

    def choose(self, x_TD: torch.Tensor) -> Choice:
        return choice_of(self(x_TD), self.num_active, self.limit)

    def margin(self, x_TD: torch.Tensor) -> torch.Tensor:
        """How far each token's choice is from another one [T]: the least change of a score that would alter it."""
        return margin_of(self(x_TD), self.num_active, self.limit)


class RepresentativeGate(nn.Module):
    """CMoE, section 3.3: one neuron speaks for each expert.

    s = |act(x g) * (x u)| with L2-normalised rows g, u (the released code), or with `signed` the plain product of
    the neuron's own rows (the paper's text). s' = softmax(s); the `num_active` highest s' + `balance_bias` are
    chosen, with weight 1 + s' * `scale`. Bias and scale are 0, and all weights 1, until training moves them.
    """

    balance_bias: torch.Tensor

    def __init__(self, hidden_size: int, cut: LayerCut, act: str, signed: bool) -> None:
        super().__init__()
        self.num_active, self.signed = cut.num_active, signed
        self.act = reference.activation(act)
        self.weight = nn.Parameter(torch.zeros(2 * cut.num_routed, hidden_size))
        self.scale = nn.Parameter(torch.zeros(cut.num_routed))
        self.register_buffer("balance_bias", torch.zeros(cut.num_routed))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Scores [T, R] in the gate's own type, before softmax."""
        product_TR = reference.gated_hidden(x_TD.to(self.weight.dtype), self.weight, self.act)
        return product_TR if self.signed else product_TR.abs()

    def ranking(self, x_TD: torch.Tensor) -> torch.Tensor:
        """What the choice goes by [T, R]: s' + bias."""
        return self(x_TD).softmax(dim=-1) + self.balance_bias

    def choose(self, x_TD: torch.Tensor) -> Choice:
        shares_TR = self(x_TD).softmax(dim=-1)
        ids_TK = reference.top_k(shares_TR + self.balance_bias, self.num_active)
        learns = torch.is_grad_enabled() and self.scale.requires_grad  # from 0 too: there the weights have a gradient
        if not learns and not self.scale.any():
            return Choice(ids_TK)
        return Choice(ids_TK, 1 + shares_TR.gather(-1, ids_TK) * self.scale[ids_TK])

    def margin(self, x_TD: torch.Tensor) -> torch.Tensor:
        """As `LinearGate.margin`, in units of s' + bias."""
        return margin_of(self.ranking(x_TD), self.num_active, None)


Gate = LinearGate | RepresentativeGate


def choice_of(scores_TR: torch.Tensor, num_active: int, limit: torch.Tensor | None) -> Choice:
    """The experts that score `limit` or more; where that is None, the `num_active` highest."""
    return Choice(reference.top_k(scores_TR, num_active) if limit is None else reference.above(scores_TR, limit))


def margin_of(scores_TR: torch.Tensor, num_active: int, limit: torch.Tensor | None) -> torch.Tensor:
    """How far each token's choice is from another one [T]: the least way of a score to `limit`, or the k-th minus the
    next score; infinite where every expert is chosen."""
    if limit is not None:
        return (scores_TR - limit).abs().amin(dim=-1)
    if num_active in (0, scores_TR.shape[-1]):
        return scores_TR.new_full(scores_TR.shape[:1], torch.inf)
    ranked = scores_TR.sort(dim=-1, descending=True).values
    return ranked[:, num_active - 1] - ranked[:, num_active]
