"""Picking the next token of each sequence from its logits: greedy, or temperature with top-p and a seed."""

from __future__ import annotations

import numpy as np
import torch

from pregate.router.messages import SamplingParams
from pregate.router.sequence import Sequence


def sample(logits_BV: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """Return one token per row of `logits_BV`; row b belongs to `sequences[b]`.

    A draw depends on the request's seed and the position alone, never on batch mates.
    """
    greedy = logits_BV.argmax(dim=-1).tolist()
    return [
        token if s.sampling.temperature == 0 else draw(row, s.sampling, s.seed, len(s.token_ids))
        for token, row, s in zip(greedy, logits_BV, sequences, strict=True)
    ]


def draw(logits_V: torch.Tensor, sampling: SamplingParams, seed: int, position: int) -> int:
    """Draw the token at `position` of a text: a function of logits, seed and position alone (Philox counter)."""
    logits = logits_V.double().cpu().numpy()
    probability = np.exp((logits - logits.max()) / sampling.temperature)
    probability /= probability.sum()
    order = np.argsort(-probability, kind="stable")
    cumulative = np.cumsum(probability[order])
    # The smallest set whose mass reaches top_p (Holtzman et al., 2020); it always holds the likeliest token.
    size = int(np.searchsorted(cumulative, sampling.top_p)) + 1
    kept = cumulative[:size]
    uniform = np.random.Generator(np.random.Philox(key=[seed, position])).random()
    return int(order[min(int(np.searchsorted(kept, uniform * kept[-1], side="right")), len(kept) - 1)])
