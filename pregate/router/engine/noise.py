"""The noise that a draw is decided by: logarithms of uniform numbers, each a function of seed, position and token id.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch

from pregate.base.device import to_device

#: Factors of a hash of 32 bits (Wellons' lowbias32), as the signed numbers torch computes with.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
#: Of 31 bits: makes the largest a little less than 1, whatever it is rounded to.
_UNIT = 2.0**-31 * (1 - 2.0**-23)


def log_uniform(seeds: Many[int], positions: Many[int], vocabulary: int, device: torch.device) -> torch.Tensor:
    """Logarithms of numbers that are uniform in (0, 1), float32 [B, V], finite and below 0; row b is of `seeds[b]` and
    `positions[b]`.

    A counter's hash and no generator: nothing is kept, and a row is the same whatever it is computed with. What is
    near 0 decides, so precision is kept there: log(1 - u) of small u.
    """
    keys_B = _mixed_64(_mixed_64(np.array(seeds, np.uint64)) + np.array(positions, np.uint64))
    keys_B2 = to_device(torch.from_numpy(keys_B.view(np.int32).reshape(-1, 2)), device)
    x_V = torch.arange(vocabulary, dtype=torch.int32, device=device)
    x_V = _mixed(_mixed(_mixed(x_V, 16).mul_(_FIRST), 15).mul_(_SECOND), 16)
    x_BV = (x_V ^ keys_B2[:, :1]).mul_(keys_B2[:, 1:] | 1)
    # Shifted with its sign, 31 bits are left, of which the factor, being odd, makes 31 others.
    x_BV.bitwise_xor_(x_BV >> 15).mul_(_SECOND).bitwise_and_(0x7FFFFFFF)
    return torch.add(torch.full((), -_UNIT / 2, device=device), x_BV.float(), alpha=-_UNIT).log1p_()


def _mixed_64(x_B: np.ndarray) -> np.ndarray:
    """A hash of 64 bits of each (SplitMix64); it wraps around."""
    x_B = x_B + np.uint64(0x9E3779B97F4A7C15)
    x_B = (x_B ^ (x_B >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_B = (x_B ^ (x_B >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_B ^ (x_B >> np.uint64(31))


def _mixed(x: torch.Tensor, bits: int) -> torch.Tensor:
    """`x ^ (x >>> bits)` in place: int32 is shifted with its sign."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << 32 - bits) - 1))
