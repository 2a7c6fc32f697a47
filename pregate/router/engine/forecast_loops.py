"""The loops of `forecast.py`, compiled: they touch the units that tokens visit, not all pairs of units.

Shape letters: N requests, P places of requests, T tokens, L layers, K experts per token, R routed experts.
"""

from __future__ import annotations

import numpy as np

from pregate.base.compiled import ANY_ORDER, compiled


@compiled(
    "void(Array(i2, 3, 'C', readonly=True), i8[::1], f4, f4[:,:,::1], f4[:,::1], i2[:,:,::1], f4[:,:,::1], f4[::1])"
)
def note(
    ids_TLK: np.ndarray,
    place_T: np.ndarray,
    keep: float,
    follows_LRR: np.ndarray,
    used_LR: np.ndarray,
    last_PLK: np.ndarray,
    lately_PLR: np.ndarray,
    weight_P: np.ndarray,
) -> None:
    """Count tokens of the requests at these places, one after another, and what came before each."""
    num_tokens, num_layers, k_max = ids_TLK.shape
    for token in range(num_tokens):
        place = place_T[token]
        weight_P[place] = weight_P[place] * keep + np.float32(1)
        for layer in range(num_layers):
            lately_R = lately_PLR[place, layer]
            lately_R *= keep
            for column in range(k_max):
                unit = ids_TLK[token, layer, column]
                if unit >= 0:
                    lately_R[unit] += np.float32(1)
                    used_LR[layer, unit] += np.float32(1)
                    for before in last_PLK[place, layer]:
                        if before >= 0:
                            follows_LRR[layer, before, unit] += np.float32(1)
            last_PLK[place, layer] = ids_TLK[token, layer]


@compiled(
    "void(i8[::1], f4, f4, f4[:,::1], f4[:,:,::1], f4[:,::1], i2[:,:,::1], f4[:,:,::1], f4[::1], f4[:,::1], f4[:,::1])",
    ANY_ORDER,
)
def chances(
    place_N: np.ndarray,
    table_tokens: float,
    average_tokens: float,
    share_LR: np.ndarray,
    follows_LRR: np.ndarray,
    used_LR: np.ndarray,
    last_PLK: np.ndarray,
    lately_PLR: np.ndarray,
    weight_P: np.ndarray,
    none_LR: np.ndarray,
    rows_LR: np.ndarray,
) -> None:
    """Write how likely none of the next tokens of the requests at these places visits a unit, and how many are expected
    to.

    Of a unit's tokens the table says which share is followed by each unit, of few tokens nearer to the average `share`.
    """
    num_layers, num_routed = share_LR.shape
    chance_R, zero, one = np.empty(num_routed, np.float32), np.float32(0), np.float32(1)
    none_LR[:], rows_LR[:] = one, zero
    for place in place_N:
        scale = one / (weight_P[place] + table_tokens)
        for layer in range(num_layers):
            chance_R[:] = lately_PLR[place, layer]
            num = 0
            for before in last_PLK[place, layer]:
                num += before >= 0
            for before in last_PLK[place, layer]:
                if before >= 0:
                    part = table_tokens / np.float32(num) / (used_LR[layer, before] + average_tokens)
                    for unit in range(num_routed):
                        both = follows_LRR[layer, before, unit] + average_tokens * share_LR[layer, unit]
                        chance_R[unit] += part * both
            for unit in range(num_routed):
                chance = min(max(chance_R[unit] * scale, zero), one)
                none_LR[layer, unit] *= one - chance
                rows_LR[layer, unit] += chance
