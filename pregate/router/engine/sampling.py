"""Picking the next token of each sequence from its logits: greedy, or temperature with top-p and a seed.

Shape letters: B rows, V vocabulary, N blocks of it, W tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch.nn import functional as F

from pregate.base.device import to_device
from pregate.router.engine.sequence import Sequence
from pregate.router.link.messages import SamplingParams

#: Tokens whose probabilities are added up before a draw looks into them one by one.
_BLOCK = 256
#: Probabilities held at once on the CPU: temporaries of a MB come from memory that is there already and stay in cache.
_CHUNK = 1 << 18


def sample(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> list[int]:
    """Return one token per row of `logits_BV`; row b belongs to `sequences[b]`.

    A draw depends on the request's seed and the position alone, never on batch mates.
    """
    tokens_B = logits_BV.argmax(dim=-1)
    drawn = [b for b, s in enumerate(sequences) if s.sampling.temperature > 0]
    if drawn:
        size = len(drawn) if logits_BV.is_cuda else max(1, _CHUNK // logits_BV.shape[1])
        for rows in [drawn[n : n + size] for n in range(0, len(drawn), size)]:
            chosen = [sequences[b] for b in rows]
            uniform = [_uniform(s.seed, len(s.token_ids)) for s in chosen]
            where = to_device(torch.tensor(rows), logits_BV.device)
            tokens_B[where] = _draw(logits_BV[where], [s.sampling for s in chosen], uniform)
    return tokens_B.tolist()


def draw(logits_V: torch.Tensor, sampling: SamplingParams, seed: int, position: int) -> int:
    """Draw the token at `position` of a text: a function of logits, seed and position alone."""
    return int(_draw(logits_V[None], [sampling], [_uniform(seed, position)]))


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) of its own for each seed and position (Philox counter)."""
    return np.random.Generator(np.random.Philox(key=[seed, position])).random()


def _draw(logits_BV: torch.Tensor, sampling: Many[SamplingParams], uniform: Many[float]) -> torch.Tensor:
    """One token id per row [B]: the first, in order of ids, whose probability and those before it exceed `uniform`."""
    device, (num_rows, vocabulary) = logits_BV.device, logits_BV.shape
    x_BV = logits_BV.float()
    smallest = torch.finfo(torch.float32).tiny
    heat_B1 = to_device(torch.tensor([max(s.temperature, smallest) for s in sampling]), device)[:, None]
    # From the highest logit down, so that a small temperature overflows to probability 0 and not to NaN.
    p_BV = ((x_BV - x_BV.amax(dim=-1, keepdim=True)) / heat_B1).softmax(dim=-1).nan_to_num_(0.0)
    cut = [b for b, s in enumerate(sampling) if s.top_p < 1]
    if cut:
        rows = to_device(torch.tensor(cut), device)
        top_p_B1 = to_device(torch.tensor([sampling[b].top_p for b in cut], dtype=torch.float64), device)[:, None]
        p_BV[rows] = _top_p(p_BV[rows], top_p_B1)
    # Looked for in two steps: sums of blocks first, then the tokens of one block.
    p_BNW = F.pad(p_BV, (0, -vocabulary % _BLOCK)).unflatten(1, (-1, _BLOCK))
    target_B1 = to_device(torch.tensor(uniform, dtype=torch.float64), device)[:, None]
    until_BN = p_BNW.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    block_B1, rest_B1 = _find(until_BN, target_B1 * until_BN[:, -1:])
    until_BW = p_BNW[torch.arange(num_rows, device=device), block_B1[:, 0]].cumsum(dim=-1, dtype=torch.float64)
    token_B1 = block_B1 * _BLOCK + _find(until_BW, rest_B1)[0]
    return token_B1[:, 0].clamp_max(vocabulary - 1)  # only of logits that are not numbers is it beyond


def _find(until_BN: torch.Tensor, target_B1: torch.Tensor, right: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The first place whose running sum exceeds the target [B, 1] (reaches it, unless `right`), and what is left of
    the target there [B, 1]."""
    last_B1 = until_BN[:, -1:]  # sums taken in another order differ in their last bits
    target_B1 = torch.minimum(target_B1, torch.nextafter(last_B1, torch.zeros_like(last_B1)) if right else last_B1)
    place_B1 = torch.searchsorted(until_BN, target_B1, right=right).clamp_max(until_BN.shape[1] - 1)
    return place_B1, target_B1 - F.pad(until_BN, (1, 0)).gather(1, place_B1)


def _top_p(p_BV: torch.Tensor, top_p_B1: torch.Tensor) -> torch.Tensor:
    """The smallest set of likeliest tokens whose mass reaches `top_p`, never empty, of equal ones the lower ids; the
    others' probability becomes 0. (Holtzman et al., 2020.)

    The least probability kept is found by its bits, which order positive numbers: the upper 16 first, then the lower.
    """
    bits_BV = p_BV.view(torch.int32)
    upper_BV = bits_BV >> 16
    upper_B1, missing_B1 = _reach(upper_BV, p_BV, top_p_B1, 1 << 14)
    there_BV = p_BV.masked_fill(upper_BV != upper_B1, 0.0)
    lower_B1, missing_B1 = _reach(bits_BV & 0xFFFF, there_BV, missing_B1, 1 << 16)
    least_B1 = (upper_B1 << 16 | lower_B1).int()
    equal_BV = bits_BV == least_B1
    num_equal_B1 = (missing_B1 / least_B1.view(torch.float32)).ceil().clamp_min(1)
    keep_BV = (bits_BV > least_B1) | (equal_BV & (equal_BV.cumsum(dim=-1) <= num_equal_B1))
    return p_BV.masked_fill(~keep_BV, 0.0)


def _reach(bin_BV: torch.Tensor, p_BV: torch.Tensor, mass_B1: torch.Tensor, num_bins: int) -> tuple:
    """The bin [B, 1] at which `p`, added up from the highest bin down, reaches `mass`, and what that bin must give."""
    mass_BH = p_BV.new_zeros(len(p_BV), num_bins, dtype=torch.float64).scatter_add_(1, bin_BV.long(), p_BV.double())
    until_BH = mass_BH.flip(1).cumsum(dim=-1)
    place_B1, missing_B1 = _find(until_BH, mass_B1, right=False)
    return num_bins - 1 - place_B1, missing_B1
