"""Rows in fp32 through experts whose weights lie in 16 bits, each made fp32 as it is read. Compiled by numba.

Four rows of a matrix at a time come from memory and meet all rows of their expert, by fours, while they lie in the
nearest cache. A row's sums are added up in the same order whatever is beside it.

A row whose width is no multiple of `LANES` ends in its last `LANES` columns, of which those that came before are 0
(`laid_out`): so weights are read as they lie, and none beyond the end of theirs.

Shape letters: P rows, sorted by unit, U units, S slots, D hidden width, M expert width, N rows and K columns of a
matrix, X columns of rows that are laid out.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

from pregate.base.compiled import compiled, inlined
from pregate.kernels.cpu.vectors import (
    LANES,
    add,
    divide,
    exp,
    load,
    load_16_bits,
    multiply,
    multiply_add,
    splat,
    store,
    store_sums,
)

#: Sums that are stored together.
_GROUP = 4
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_TYPES = "void(f4[:,::1], i8[::1], i8[::1], {0}[:,:,::1], {0}[:,:,::1], f4[:,::1])"


@inlined()
def _one_row(x_PX, p, w_SNK, w0, w1, w2, w3, out_PX, n):  # noqa: ANN001, ANN202
    """Columns n to n + 3 of a row of `out`, from the rows of weights that begin at these elements of `w_SNK`."""
    end = w_SNK.shape[2] - LANES
    x = p * x_PX.shape[1]
    s0 = s1 = s2 = s3 = splat(_ZERO)
    for k in range(0, x_PX.shape[1], LANES):
        at, row = min(k, end), load(x_PX, x + k)
        s0 = multiply_add(row, load_16_bits(w_SNK, w0 + at), s0)
        s1 = multiply_add(row, load_16_bits(w_SNK, w1 + at), s1)
        s2 = multiply_add(row, load_16_bits(w_SNK, w2 + at), s2)
        s3 = multiply_add(row, load_16_bits(w_SNK, w3 + at), s3)
    store_sums(out_PX, p * out_PX.shape[1] + n, _ONE, s0, s1, s2, s3)


@inlined()
def _four_rows(x_PX, p, q, r, t, w_SNK, w0, w1, w2, w3, out_PX, n):  # noqa: ANN001, ANN202
    """As `_one_row` of rows p, q, r and t."""
    end, stride = w_SNK.shape[2] - LANES, x_PX.shape[1]
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = splat(_ZERO)
    for k in range(0, stride, LANES):
        at = min(k, end)
        a, b = load(x_PX, p * stride + k), load(x_PX, q * stride + k)
        c, d = load(x_PX, r * stride + k), load(x_PX, t * stride + k)
        w = load_16_bits(w_SNK, w0 + at)
        a0, b0, c0, d0 = multiply_add(a, w, a0), multiply_add(b, w, b0), multiply_add(c, w, c0), multiply_add(d, w, d0)
        w = load_16_bits(w_SNK, w1 + at)
        a1, b1, c1, d1 = multiply_add(a, w, a1), multiply_add(b, w, b1), multiply_add(c, w, c1), multiply_add(d, w, d1)
        w = load_16_bits(w_SNK, w2 + at)
        a2, b2, c2, d2 = multiply_add(a, w, a2), multiply_add(b, w, b2), multiply_add(c, w, c2), multiply_add(d, w, d2)
        w = load_16_bits(w_SNK, w3 + at)
        a3, b3, c3, d3 = multiply_add(a, w, a3), multiply_add(b, w, b3), multiply_add(c, w, c3), multiply_add(d, w, d3)
    stride = out_PX.shape[1]
    store_sums(out_PX, p * stride + n, _ONE, a0, a1, a2, a3)
    store_sums(out_PX, q * stride + n, _ONE, b0, b1, b2, b3)
    store_sums(out_PX, r * stride + n, _ONE, c0, c1, c2, c3)
    store_sums(out_PX, t * stride + n, _ONE, d0, d1, d2, d3)


@inlined()
def _multiply(x_PX, first, stop, w_SNK, slot, out_PX):  # noqa: ANN001, ANN202
    """out = x w' for rows `first` to `stop`; what stands beyond its N columns means nothing. Where fewer than four rows
    are left the last is computed again: that costs less than one after another."""
    num, width = w_SNK.shape[1], w_SNK.shape[2]
    base, last = slot * num, num - 1
    for n in range(0, num, _GROUP):
        w0, w1 = (base + n) * width, (base + min(n + 1, last)) * width
        w2, w3 = (base + min(n + 2, last)) * width, (base + min(n + 3, last)) * width
        if stop - first == 1:
            _one_row(x_PX, first, w_SNK, w0, w1, w2, w3, out_PX, n)
            continue
        for p in range(first, stop, _GROUP):
            q, r, t = min(p + 1, stop - 1), min(p + 2, stop - 1), min(p + 3, stop - 1)
            _four_rows(x_PX, p, q, r, t, w_SNK, w0, w1, w2, w3, out_PX, n)


@inlined()
def _gate(gate_up_PX, p, width, h_PX):  # noqa: ANN001, ANN202
    """h = silu(gate) * up, laid out."""
    row, h, one, end = p * gate_up_PX.shape[1], p * h_PX.shape[1], splat(_ONE), width - LANES
    for m in range(0, h_PX.shape[1], LANES):
        gate, up = load(gate_up_PX, row + min(m, end)), load(gate_up_PX, row + width + min(m, end))
        silu = divide(gate, add(one, exp(multiply(gate, splat(-_ONE)))))
        store(h_PX, h + m, multiply(silu, up))
    whole = width // LANES * LANES
    h_PX[p, whole : whole + h_PX.shape[1] - width] = _ZERO


@inlined()
def _experts(x_PX, slot_U, count_U, gate_up_SMD, down_SDM, y_PX):  # noqa: ANN001, ANN202
    width, first = down_SDM.shape[2], 0
    gate_up_PX = np.empty((len(x_PX), 2 * width + _GROUP), np.float32)
    h_PX = np.empty((len(x_PX), -(-width // LANES) * LANES), np.float32)
    for u in range(len(slot_U)):
        stop = first + count_U[u]
        _multiply(x_PX, first, stop, gate_up_SMD, slot_U[u], gate_up_PX)
        for p in range(first, stop):
            _gate(gate_up_PX, p, width, h_PX)
        _multiply(h_PX, first, stop, down_SDM, slot_U[u], y_PX)
        first = stop


@compiled(_TYPES.format("i2"))
def _bfloat16(x_PX, slot_U, count_U, gate_up_SMD, down_SDM, y_PX):  # noqa: ANN001, ANN202
    _experts(x_PX, slot_U, count_U, gate_up_SMD, down_SDM, y_PX)


@compiled(_TYPES.format("u2"))
def _float16(x_PX, slot_U, count_U, gate_up_SMD, down_SDM, y_PX):  # noqa: ANN001, ANN202
    _experts(x_PX, slot_U, count_U, gate_up_SMD, down_SDM, y_PX)


_OF_DTYPE: dict[torch.dtype, tuple[Callable[..., None], torch.dtype]] = {
    torch.bfloat16: (_bfloat16, torch.int16),
    torch.float16: (_float16, torch.uint16),
}


def run_experts(
    x_PD: torch.Tensor, slots: list[int], counts: list[int], gate_up_SMD: torch.Tensor, down_SDM: torch.Tensor
) -> torch.Tensor:
    """Return [P, D] in fp32: `counts[i]` of the rows, in fp32 and in order, through the expert in `slots[i]`, whose
    weights [S, 2M, D], gates first, and [S, D, M] are bfloat16 or float16. Both widths are `LANES` or more.

    As many threads as torch has share the experts. Example: slots [4, 0], counts [2, 1]: rows 0 and 1 go through the
    expert in slot 4, row 2 through the one in slot 0.
    """
    run, bits = _OF_DTYPE[down_SDM.dtype]
    num_rows, hidden = x_PD.shape
    x_PX = laid_out(x_PD) if hidden % LANES else x_PD.contiguous()
    y_PX = torch.empty(num_rows, -(-hidden // _GROUP) * _GROUP)
    weights = [part.view(bits).numpy() for part in (gate_up_SMD, down_SDM)]
    slot_U, count_U, x, y = np.array(slots), np.array(counts), x_PX.numpy(), y_PX.numpy()

    def run_some(units_U: np.ndarray) -> None:
        first, last = units_U[0], units_U[-1] + 1
        rows = slice(*(int(count_U[:unit].sum()) for unit in (first, last)))
        run(x[rows], slot_U[first:last], count_U[first:last], *weights, y[rows])

    num_threads = min(torch.get_num_threads(), len(slots))
    if num_threads == 1:
        run(x, slot_U, count_U, *weights, y)
    else:
        list(_threads(num_threads).map(run_some, np.array_split(np.arange(len(slots)), num_threads)))
    return y_PX[:, :hidden]


@cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, "pregate-experts")


def laid_out(x_PD: torch.Tensor) -> torch.Tensor:
    """Rows that end in a vector of their own, as the module says.

    Example, for vectors of four: [1, 2, 3, 4, 5, 6] gives [1, 2, 3, 4, 0, 0, 5, 6].
    """
    whole = x_PD.shape[1] // LANES * LANES
    last_PX = x_PD[:, -LANES:].clone()
    last_PX[:, : LANES - (x_PD.shape[1] - whole)] = 0
    return torch.cat([x_PD[:, :whole], last_PX], dim=1)
