"""DSelect-k (Hazimeh et al. 2021): selectors, each a binary code that names one expert of its layer.

Trained, a code's bits are smooth steps of logits, so that the choice has a gradient and yet becomes exactly 0 or 1
(section 3). To choose, expert r scores as the selector that agrees with its code best does in its worst bit: a
selector's own code scores above 0, any other below, so the selectors' experts come first and the rest follow in the
order of how little a selector would have to change its mind.

With a fixed number of experts there are as many selectors, as in the paper. Ours for a number that varies: twice as
many, up to one for each expert, and room for at least one code that names none.

Shape letters: R routed experts, K selectors, B bits of a code, any leading dimensions (...).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pregate.model.config import LayerCut


def code_shape(cut: LayerCut, selection: str) -> tuple[int, int]:
    """Selectors K of a layer and bits B of a code (0 and 1 where nothing is to be chosen)."""
    if selection == "top_k":
        return cut.num_active, _num_bits(cut.num_routed)
    return min(cut.num_routed, 2 * cut.num_active), _num_bits(cut.num_routed + 1)


def _num_bits(num_codes: int) -> int:
    return max(1, (num_codes - 1).bit_length())


def num_logits(cut: LayerCut, selection: str) -> int:
    """Code logits of a layer, K * B."""
    selectors, bits = code_shape(cut, selection)
    return selectors * bits


def code_signs(num_routed: int, num_bits: int, like: torch.Tensor) -> torch.Tensor:
    """Expert r's code as +1 and -1 [R, B], lowest bit first. Example: 3 experts: [[-1, -1], [1, -1], [-1, 1]]."""
    bits = torch.arange(num_bits, device=like.device)
    experts = torch.arange(num_routed, device=like.device)
    return (2 * ((experts[:, None] >> bits) & 1) - 1).to(like.dtype)


def selector_logits(logits: torch.Tensor, cuts: Sequence[LayerCut], selection: str) -> list[torch.Tensor]:
    """Per layer the logits [..., K, B] out of all layers' side by side [..., O]."""
    parts = logits.split([num_logits(c, selection) for c in cuts], dim=-1)
    return [p.unflatten(-1, code_shape(c, selection)) for p, c in zip(parts, cuts, strict=True)]


def code_scores(logits: torch.Tensor, cuts: Sequence[LayerCut], selection: str) -> torch.Tensor:
    """Scores [..., S] of all layers' experts: the greatest over selectors of the least over bits of +-logit.

    A layer without selectors scores 0. Example: R = 4, one selector with logits [2, -1] (code 01, expert 1): experts
    0 to 3 score -2, 1, -2, -1.
    """
    scores = []
    for cut, layer in zip(cuts, selector_logits(logits, cuts, selection), strict=True):
        if not cut.num_active:
            scores.append(logits.new_zeros(*logits.shape[:-1], cut.num_routed))
            continue
        agreement = layer[..., None, :] * code_signs(cut.num_routed, layer.shape[-1], logits)
        scores.append(agreement.amin(dim=-1).amax(dim=-2))
    return torch.cat(scores, dim=-1)
