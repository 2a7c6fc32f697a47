"""Attention over a paged cache on a CPU in fp32: rotation and storing, and rows that attend. Compiled by numba; what
each does `step.py` says.

Keys and values are read where they lie, through the block table, in the order in which they lie: no copy, no mask, no
padding. Three heads' rows that share keys stay in registers while these pass.

Shape letters: T rows of a step, H = Q + 2 G heads of a row (queries, keys, values), Q query heads, G key/value heads,
E head width, R rotated width, S slots of the cache, B block tables, N blocks of a table, C context tokens.
"""

from __future__ import annotations

import numpy as np

from pregate.base.compiled import compiled, inlined
from pregate.kernels.cpu.vectors import (
    LANES,
    add,
    divide,
    exp,
    largest,
    load,
    maximum,
    multiply,
    multiply_add,
    prefetch,
    splat,
    store,
    store_sums,
    sum_of,
)

#: Tokens of a context that are scored together, vectors of a row that are weighed together, heads of each.
_KEYS, _VECTORS, _HEADS = 4, 4, 3
#: Tokens of which all heads' values are added before the next ones' are, and how far ahead memory is asked for some.
_TILE, _AHEAD = 32, 16
#: What an array over a context has beyond it: groups may end there.
_BEYOND = 32
_ZERO, _ONE, _TWO, _INF = (np.float32(x) for x in (0, 1, 2, np.inf))
_LARGEST = np.finfo(np.float32).max


@compiled("void(f4[:,:,::1], f4[:,::1], f4[:,::1], i8[::1], f4[:,:,::1], f4[:,:,::1])")
def place(heads_THE, cos_TR, sin_TR, slot_T, keys_SGE, values_SGE):  # noqa: ANN001, ANN201, D103
    num_rows, num_heads, width = heads_THE.shape
    num_kv, half = keys_SGE.shape[1], cos_TR.shape[1] // 2
    for t in range(num_rows):
        cos_R, sin_R = cos_TR[t], sin_TR[t]
        for h in range(num_heads - num_kv):
            x_E = heads_THE[t, h]
            for e in range(half):
                low, high = x_E[e], x_E[e + half]
                x_E[e] = low * cos_R[e] + high * sin_R[e]
                x_E[e + half] = high * cos_R[e + half] + low * sin_R[e + half]
        for g in range(num_kv):
            key_E, value_E = heads_THE[t, num_heads - 2 * num_kv + g], heads_THE[t, num_heads - num_kv + g]
            to_key_E, to_value_E = keys_SGE[slot_T[t], g], values_SGE[slot_T[t], g]
            for e in range(width):
                to_key_E[e] = key_E[e] if abs(key_E[e]) <= _LARGEST else _ZERO
            for e in range(width):
                to_value_E[e] = value_E[e] if abs(value_E[e]) <= _LARGEST else _ZERO


@inlined()
def _slots(block_N, block_size, length, slot_C):  # noqa: ANN001, ANN202
    """Where each token of a context lies; beyond it, where its last one does."""
    for n in range((length + block_size - 1) // block_size):
        first, slot = n * block_size, block_N[n] * block_size
        for c in range(first, min(first + block_size, length)):
            slot_C[c] = slot + c - first
    slot_C[length : length + _BEYOND] = slot_C[length - 1]


@inlined()
def _fetch(cache_SGE, slot, g):  # noqa: ANN001, ANN202
    """Ask memory for a head of a token."""
    width = cache_SGE.shape[2]
    for e in range(0, width, 16):
        prefetch(cache_SGE, (slot * cache_SGE.shape[1] + g) * width + e)


@inlined()
def _score(q_THE, t, keys_SGE, slot_C, first, length, scaling, score_QC):  # noqa: ANN001, ANN202
    """Scores of all heads of a row."""
    num_heads, (_, num_kv, width) = score_QC.shape[0], keys_SGE.shape
    repeat, whole, stride = num_heads // num_kv, width // LANES * LANES, score_QC.shape[1]
    for c in range(first, length, _KEYS):
        for g in range(num_kv):
            for n in range(_KEYS):
                _fetch(keys_SGE, slot_C[c + n + _AHEAD], g)
            k0, k1 = (slot_C[c] * num_kv + g) * width, (slot_C[c + 1] * num_kv + g) * width
            k2, k3 = (slot_C[c + 2] * num_kv + g) * width, (slot_C[c + 3] * num_kv + g) * width
            for h in range(g * repeat, (g + 1) * repeat, _HEADS):
                i, j = min(h + 1, (g + 1) * repeat - 1), min(h + 2, (g + 1) * repeat - 1)
                row = t * q_THE.shape[1]
                q, r, s = (row + h) * width, (row + i) * width, (row + j) * width
                q0 = q1 = q2 = q3 = r0 = r1 = r2 = r3 = s0 = s1 = s2 = s3 = splat(_ZERO)
                for e in range(0, whole, LANES):
                    q_e, r_e, s_e = load(q_THE, q + e), load(q_THE, r + e), load(q_THE, s + e)
                    key = load(keys_SGE, k0 + e)
                    q0, r0, s0 = multiply_add(q_e, key, q0), multiply_add(r_e, key, r0), multiply_add(s_e, key, s0)
                    key = load(keys_SGE, k1 + e)
                    q1, r1, s1 = multiply_add(q_e, key, q1), multiply_add(r_e, key, r1), multiply_add(s_e, key, s1)
                    key = load(keys_SGE, k2 + e)
                    q2, r2, s2 = multiply_add(q_e, key, q2), multiply_add(r_e, key, r2), multiply_add(s_e, key, s2)
                    key = load(keys_SGE, k3 + e)
                    q3, r3, s3 = multiply_add(q_e, key, q3), multiply_add(r_e, key, r3), multiply_add(s_e, key, s3)
                store_sums(score_QC, h * stride + c, scaling, q0, q1, q2, q3)
                store_sums(score_QC, i * stride + c, scaling, r0, r1, r2, r3)
                store_sums(score_QC, j * stride + c, scaling, s0, s1, s2, s3)
            if whole < width:
                for h in range(g * repeat, (g + 1) * repeat):
                    for n in range(_KEYS):
                        for e in range(whole, width):
                            score_QC[h, c + n] += q_THE[t, h, e] * keys_SGE[slot_C[c + n], g, e] * scaling


@inlined()
def _weigh(score_QC, h, first, length, softcap):  # noqa: ANN001, ANN202
    """Make a head's scores weights, in place; return what they sum up to."""
    start, stop = h * score_QC.shape[1] + first, h * score_QC.shape[1] + length
    if softcap > _ZERO:
        cap, twice = splat(softcap), splat(_TWO / softcap)
        for c in range(start, stop, LANES):  # tanh(x) = 1 - 2 / (e^2x + 1)
            below = divide(splat(-_TWO), add(exp(multiply(load(score_QC, c), twice)), splat(_ONE)))
            store(score_QC, c, multiply_add(cap, below, cap))
    score_QC[h, length : length + _BEYOND] = -_INF
    most, total = splat(-_INF), splat(_ZERO)
    for c in range(start, stop, LANES):
        most = maximum(most, load(score_QC, c))
    less = splat(-largest(most))
    for c in range(start, stop, LANES):
        weight = exp(add(load(score_QC, c), less))
        store(score_QC, c, weight)
        total = add(total, weight)
    return sum_of(total)


@inlined()
def _load4(array, index):  # noqa: ANN001, ANN202
    second, third = index + LANES, index + 2 * LANES
    return load(array, index), load(array, second), load(array, third), load(array, third + LANES)


@inlined()
def _store4(array, index, vectors):  # noqa: ANN001, ANN202
    store(array, index, vectors[0])
    store(array, index + LANES, vectors[1])
    store(array, index + 2 * LANES, vectors[2])
    store(array, index + 3 * LANES, vectors[3])


@inlined()
def _add_values(values_SGE, slot_C, first, stop, score_QC, g, e, out_TQE, t):  # noqa: ANN001, ANN202
    """Add up weighted values of a key head from column `e` on, four vectors of all heads that share it."""
    (_, num_kv, width), num_heads = values_SGE.shape, out_TQE.shape[1]
    repeat = num_heads // num_kv
    for h in range(g * repeat, (g + 1) * repeat, _HEADS):
        i, j = min(h + 1, (g + 1) * repeat - 1), min(h + 2, (g + 1) * repeat - 1)
        row = t * num_heads
        x, y, z = (row + h) * width + e, (row + i) * width + e, (row + j) * width + e
        x0, x1, x2, x3 = _load4(out_TQE, x)
        y0, y1, y2, y3 = _load4(out_TQE, y)
        z0, z1, z2, z3 = _load4(out_TQE, z)
        for c in range(first, stop):
            v = (slot_C[c] * num_kv + g) * width + e
            p, q, r = splat(score_QC[h, c]), splat(score_QC[i, c]), splat(score_QC[j, c])
            value = load(values_SGE, v)
            x0, y0, z0 = multiply_add(p, value, x0), multiply_add(q, value, y0), multiply_add(r, value, z0)
            value = load(values_SGE, v + LANES)
            x1, y1, z1 = multiply_add(p, value, x1), multiply_add(q, value, y1), multiply_add(r, value, z1)
            value = load(values_SGE, v + 2 * LANES)
            x2, y2, z2 = multiply_add(p, value, x2), multiply_add(q, value, y2), multiply_add(r, value, z2)
            value = load(values_SGE, v + 3 * LANES)
            x3, y3, z3 = multiply_add(p, value, x3), multiply_add(q, value, y3), multiply_add(r, value, z3)
        _store4(out_TQE, x, (x0, x1, x2, x3))
        _store4(out_TQE, y, (y0, y1, y2, y3))
        _store4(out_TQE, z, (z0, z1, z2, z3))


@inlined()
def _weighted(values_SGE, slot_C, first, length, score_QC, out_TQE, t):  # noqa: ANN001, ANN202
    """Weighted values of all heads of a row, tile by tile."""
    (_, num_kv, width), num_heads = values_SGE.shape, out_TQE.shape[1]
    repeat, wide = num_heads // num_kv, _VECTORS * LANES
    whole = width // wide * wide
    out_TQE[t] = _ZERO
    for c in range(first, length, _TILE):
        stop = min(c + _TILE, length)
        for g in range(num_kv):
            for n in range(stop, min(stop + _TILE, length)):
                _fetch(values_SGE, slot_C[n], g)
            for e in range(0, whole, wide):
                _add_values(values_SGE, slot_C, c, stop, score_QC, g, e, out_TQE, t)
            if whole < width:
                for h in range(g * repeat, (g + 1) * repeat):
                    out_E = out_TQE[t, h]
                    for n in range(c, stop):
                        value_E, weight = values_SGE[slot_C[n], g], score_QC[h, n]
                        for e in range(whole, width):
                            out_E[e] += weight * value_E[e]


@compiled("void(f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], i8[::1], i8[::1], i8[:,::1], i8, f8, i8, f8, f4[:,:,::1])")
def attend(q_THE, keys_SGE, values_SGE, length_A, table_A, block_BN, block_size, scaling, window, softcap, out_TQE):  # noqa: ANN001, ANN201, D103
    longest, num_heads = 0, out_TQE.shape[1]
    for t in range(len(length_A)):
        longest = max(longest, length_A[t])
    score_QC, total_Q = np.empty((num_heads, longest + _BEYOND), np.float32), np.empty(num_heads, np.float32)
    slot_C = np.empty(longest + _BEYOND, np.int64)
    for t in range(len(length_A)):
        length = length_A[t]
        first = max(length - window, 0) if window > 0 else 0
        _slots(block_BN[table_A[t]], block_size, length, slot_C)
        _score(q_THE, t, keys_SGE, slot_C, first, length, np.float32(scaling), score_QC)
        for h in range(num_heads):
            total_Q[h] = _weigh(score_QC, h, first, length, np.float32(softcap))
        _weighted(values_SGE, slot_C, first, length, score_QC, out_TQE, t)
        for h in range(num_heads):
            out_E, scale = out_TQE[t, h], _ONE / total_Q[h]
            for e in range(len(out_E)):
                out_E[e] *= scale
