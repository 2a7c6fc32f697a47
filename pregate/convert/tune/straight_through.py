"""Weights of experts as the deployed routing gives them, with a gradient to the scores it chose by.

The choice is a step, whose gradient is 0; behind it stands a soft choice, and its gradient is taken for the step's
(the straight-through estimator: Bengio et al. 2013, "Estimating or propagating gradients through stochastic
neurons", section 4).

Shape letters: T tokens, R routed experts.
"""

from __future__ import annotations

import torch

#: Added to the standard deviation of scores before they are divided by it.
LEAST_SPREAD = 1e-6


def soft_choice(scores_TR: torch.Tensor, num_active: int, threshold: torch.Tensor | None) -> torch.Tensor:
    """A smooth stand-in for the choice [T, R], in units of the scores' own spread (which gets no gradient).

    By threshold: the sigmoid of the distance to it. Else the softmax times `num_active`, so that a token's sum is
    that of its hard choice.
    """
    spread = scores_TR.detach().std(correction=0) + LEAST_SPREAD
    if threshold is not None:
        return ((scores_TR - threshold) / spread).sigmoid()
    return num_active * (scores_TR / spread).softmax(dim=-1)


def straight_through(
    scores_TR: torch.Tensor,
    chosen_TR: torch.Tensor,
    num_active: int,
    threshold: torch.Tensor | None = None,
    learns: bool = True,
) -> torch.Tensor:
    """Return [T, R] of exactly 1 where `chosen_TR` (bool) and 0 elsewhere.

    Its gradient is that of `soft_choice`; it has none unless it `learns`.
    """
    hard_TR = chosen_TR.to(scores_TR.dtype)
    if not (learns and torch.is_grad_enabled() and scores_TR.requires_grad):
        return hard_TR
    soft_TR = soft_choice(scores_TR, num_active, threshold)
    return hard_TR + (soft_TR - soft_TR.detach())
