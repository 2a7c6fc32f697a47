"""What a request may ask of sampling, and one sentence for each value that is out of range, at every entrance."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pregate.base.errors import UserError

MAX_SEED = (1 << 63) - 1


def check_sampling(max_tokens: int, temperature: float, top_p: float, seed: int | None) -> None:
    """Raise UserError naming the field, the value and what is allowed."""
    if max_tokens < 1:
        raise UserError.of("max_tokens", max_tokens, "must be at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError.of("temperature", temperature, "must be 0 (greedy) or a finite number above 0")
    if not 0 < top_p <= 1:
        raise UserError.of("top_p", top_p, "must be above 0 and at most 1")
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise UserError.of("seed", seed, f"must be 0 to {MAX_SEED}")


def check_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raise UserError naming the first of `token_ids` that is no token of the vocabulary."""
    outside = next((i for i in token_ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise UserError.of(name, outside, f"must be 0 to {vocab_size - 1}")
