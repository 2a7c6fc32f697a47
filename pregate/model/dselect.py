"""DSelect-k (Hazimeh et al. 2021): k selectors per layer, each a binary code that names one expert.

Trained, a code's bits are smooth steps of logits, so that the choice has a gradient and yet becomes exactly 0 or 1
(section 3). To choose, expert r scores as the selector that agrees with its code best does in its worst bit: a
selector's own code scores above 0, any other below, so the selectors' experts come first and the rest follow in the
order of how little a selector would have to change its mind.

Shape letters: R routed experts, K selectors, B bits of a code, any leading dimensions (...).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pregate.model.config import LayerCut


def num_bits(num_routed: int) -> int:
    """Bits of a code that can name each of `num_routed` experts (1 or more)."""
    return max(1, (num_routed - 1).bit_length())


def num_logits(cut: LayerCut) -> int:
    """Code logits of a layer: a selector for each active expert, `num_bits` each."""
    return cut.num_active * num_bits(cut.num_routed)


def code_signs(num_routed: int, like: torch.Tensor) -> torch.Tensor:
    """Expert r's code as +1 and -1 [R, B], lowest bit first. Example: 3 experts: [[-1, -1], [1, -1], [-1, 1]]."""
    bits = torch.arange(num_bits(num_routed), device=like.device)
    experts = torch.arange(num_routed, device=like.device)
    return (2 * ((experts[:, None] >> bits) & 1) - 1).to(like.dtype)


def selector_logits(logits: torch.Tensor, cuts: Sequence[LayerCut]) -> list[torch.Tensor]:
    """Per layer the logits [..., K, B] out of all layers' side by side [..., O]."""
    parts = logits.split([num_logits(c) for c in cuts], dim=-1)
    return [p.unflatten(-1, (c.num_active, num_bits(c.num_routed))) for p, c in zip(parts, cuts, strict=True)]


def code_scores(logits: torch.Tensor, cuts: Sequence[LayerCut]) -> torch.Tensor:
    """Scores [..., S] of all layers' experts: the greatest over selectors of the least over bits of +-logit.

    A layer without selectors scores 0. Example: R = 4, one selector with logits [2, -1] (code 01, expert 1): experts
    0 to 3 score -2, 1, -2, -1.
    """
    scores = []
    for cut, layer in zip(cuts, selector_logits(logits, cuts), strict=True):
        if not cut.num_active:
            scores.append(logits.new_zeros(*logits.shape[:-1], cut.num_routed))
            continue
        agreement = layer[..., None, :] * code_signs(cut.num_routed, logits)
        scores.append(agreement.amin(dim=-1).amax(dim=-2))
    return torch.cat(scores, dim=-1)
