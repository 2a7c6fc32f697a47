"""Picking the next token of each sequence from its logits: greedy, or drawn with a seed.

What a request asks for is computed for all its rows at once; transformers' logits processors, which these are held to
in the tests, take one value for a whole batch and sort the vocabulary.

Shape letters: B rows, V vocabulary, P places of a row, H bins of probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch.nn import functional as F

from pregate.base.completion import TokenLogprob
from pregate.base.device import to_device
from pregate.router.engine.noise import log_uniform
from pregate.router.engine.sequence import Sequence
from pregate.router.link.messages import SamplingParams

#: Probabilities held at once on the CPU: temporaries of a MB come from memory that is there already and stay in cache.
_CHUNK = 1 << 18


def sample(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> list[int]:
    """Return one token per row of `logits_BV`; row b belongs to `sequences[b]`.

    A draw depends on the request's seed and the position alone, never on batch mates.
    """
    logits_BV = _processed(logits_BV, sequences)
    drawn = [b for b, s in enumerate(sequences) if s.sampling.temperature > 0]
    if len(drawn) < len(sequences):
        tokens_B = logits_BV.argmax(dim=-1)
    else:
        tokens_B = torch.empty(len(drawn), dtype=torch.int64, device=logits_BV.device)
    if drawn:
        size = len(drawn) if logits_BV.is_cuda else max(1, _CHUNK // logits_BV.shape[1])
        for rows in [drawn[n : n + size] for n in range(0, len(drawn), size)]:
            chosen = [sequences[b] for b in rows]
            asked = [s.sampling for s in chosen], [s.seed for s in chosen], [len(s.token_ids) for s in chosen]
            where = to_device(torch.tensor(rows), logits_BV.device)
            tokens_B[where] = _race(logits_BV[where], *asked).argmax(dim=-1)
    return tokens_B.tolist()


def token_logprobs(logits_BV: torch.Tensor, token_ids: Many[int], num_top: Many[int]) -> list[TokenLogprob]:
    """The logprob of one token of each row, and the `num_top[b]` likeliest ones."""
    if not token_ids:
        return []
    x_BV = logits_BV.float()
    ids_B1 = to_device(torch.tensor(token_ids, dtype=torch.int64), x_BV.device)[:, None]
    whole_B1 = x_BV.logsumexp(dim=-1, keepdim=True)
    chosen = (x_BV.gather(1, ids_B1) - whole_B1)[:, 0].tolist()
    top_BP, place_BP = x_BV.topk(min(max(num_top), x_BV.shape[1]), dim=-1)
    likeliest = [
        tuple(zip(ids[:n], values[:n], strict=True))
        for ids, values, n in zip(place_BP.tolist(), (top_BP - whole_B1).tolist(), num_top, strict=True)
    ]
    return [TokenLogprob(*fields) for fields in zip(token_ids, chosen, likeliest, strict=True)]


def _processed(logits_BV: torch.Tensor, sequences: Many[Sequence]) -> torch.Tensor:
    """The logits with bias and penalties, -inf where a token would end a text too soon; the given ones are kept."""
    rows = [b for b, s in enumerate(sequences) if s.changes_logits]
    if not rows:
        return logits_BV
    x_BV = logits_BV.float().clone()
    biased = [(b, i, v) for b in rows for i, v in sequences[b].sampling.logit_bias]
    if biased:
        _add(x_BV, *(list(column) for column in zip(*biased, strict=True)))
    repeated = [b for b in rows if sequences[b].repetition_penalty != 1]
    if repeated:
        lengths = [len(sequences[b].token_ids) for b in repeated]
        places = _places(x_BV, np.repeat(repeated, lengths), np.concatenate([sequences[b].token_ids for b in repeated]))
        factor = np.repeat([sequences[b].repetition_penalty for b in repeated], lengths)
        factor_P = to_device(torch.from_numpy(factor.astype(np.float32)), x_BV.device)
        seen_P = x_BV[places]
        # A token that is there twice is written twice, and the same.
        x_BV[places] = torch.where(seen_P < 0, seen_P * factor_P, seen_P / factor_P)
    for b in rows:
        sequence, sampling = sequences[b], sequences[b].sampling
        if (sampling.presence_penalty or sampling.frequency_penalty) and sequence.num_generated:
            ids, counts = np.unique(sequence.token_ids[sequence.num_prompt :], return_counts=True)
            taken = sampling.presence_penalty + sampling.frequency_penalty * counts
            _add(x_BV, np.full(len(ids), b), ids, -taken)
        if sequence.num_generated < sampling.min_tokens and sequence.end_ids:
            x_BV[b, to_device(torch.tensor(sorted(sequence.end_ids)), x_BV.device)] = -torch.inf
    return x_BV


def _places(
    x_BV: torch.Tensor, rows: Many[int] | np.ndarray, columns: Many[int] | np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    device = x_BV.device
    row_P, column_P = (to_device(torch.from_numpy(np.asarray(p, dtype=np.int64)), device) for p in (rows, columns))
    return row_P, column_P


def _add(
    x_BV: torch.Tensor, rows: Many[int] | np.ndarray, columns: Many[int] | np.ndarray, values: Many[float] | np.ndarray
) -> None:
    """Add values at places, each of which is named once, in the logits' own precision."""
    places = _places(x_BV, rows, columns)
    x_BV[places] += to_device(torch.from_numpy(np.asarray(values, dtype=np.float32)), x_BV.device)


def draw(logits_V: torch.Tensor, sampling: SamplingParams, seed: int, position: int) -> int:
    """Draw the token at `position` of a text: a function of logits, seed and position alone."""
    return int(scores(logits_V, sampling, seed, position).argmax())


def scores(logits_V: torch.Tensor, sampling: SamplingParams, seed: int, position: int) -> torch.Tensor:
    """The perturbed log-probabilities float64 [V] of which a draw takes the highest: by how far says how safe it is."""
    return -(-_race(logits_V[None], [sampling], [seed], [position])[0].double()).log()


def _race(
    logits_BV: torch.Tensor, sampling: Many[SamplingParams], seeds: Many[int], positions: Many[int]
) -> torch.Tensor:
    """Of each token [B, V] how long it takes, below 0; the first is drawn, each as often as its share says.

    Exponential races (Gumbel-max): where rounding moves every share a little, another token wins only if the first two
    are as close. A number looked up in a running sum would part at any of the V bounds.
    """
    return log_uniform(seeds, positions, logits_BV.shape[1], logits_BV.device).div_(chances(logits_BV, sampling))


def chances(logits_BV: torch.Tensor, sampling: Many[SamplingParams]) -> torch.Tensor:
    """Of each token its share of being drawn [B, V]: 0 of those that are left out, the others in proportion."""
    device, vocabulary = logits_BV.device, logits_BV.shape[1]
    x_BV = logits_BV.float()
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    heat_B1 = to_device(torch.tensor([min(max(s.temperature, least), most) for s in sampling]), device)[:, None]
    kept = [b for b, s in enumerate(sampling) if 0 < s.top_k < vocabulary]
    if kept:
        rows = to_device(torch.tensor(kept), device)
        last_B1 = to_device(torch.tensor([sampling[b].top_k - 1 for b in kept]), device)[:, None]
        most_BP = x_BV[rows].topk(max(sampling[b].top_k for b in kept), dim=-1).values
        x_BV = x_BV.index_put((rows,), x_BV[rows].masked_fill(x_BV[rows] < most_BP.gather(1, last_B1), -torch.inf))
    # From the highest logit down, so that a small temperature overflows to probability 0 and not to NaN.
    p_BV = ((x_BV - x_BV.amax(dim=-1, keepdim=True)) / heat_B1).softmax(dim=-1).nan_to_num_(0.0)
    cut = [b for b, s in enumerate(sampling) if s.top_p < 1]
    if cut:
        rows = to_device(torch.tensor(cut), device)
        top_p_B1 = to_device(torch.tensor([sampling[b].top_p for b in cut], dtype=torch.float64), device)[:, None]
        p_BV[rows] = _top_p(p_BV[rows], top_p_B1)
    least = [b for b, s in enumerate(sampling) if s.min_p > 0]
    if least:
        rows = to_device(torch.tensor(least), device)
        min_p_B1 = to_device(torch.tensor([sampling[b].min_p for b in least]), device)[:, None]
        some_BV = p_BV[rows]
        p_BV[rows] = some_BV.masked_fill(some_BV < min_p_B1 * some_BV.amax(dim=-1, keepdim=True), 0.0)
    return p_BV


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
    mass_B1 = torch.minimum(mass_B1, until_BH[:, -1:])  # sums taken in another order differ in their last bits
    place_B1 = torch.searchsorted(until_BH, mass_B1).clamp_max(num_bins - 1)
    return num_bins - 1 - place_B1, mass_B1 - F.pad(until_BH, (1, 0)).gather(1, place_B1)
