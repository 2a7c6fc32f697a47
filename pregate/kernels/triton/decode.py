"""Triton kernels of the expert FFN for at most 8 tokens: (C) a gate-up and down pair that neither sorts nor scatters.

Both read the ids as they are. A unit's weights are read once for all tokens that use it; tokens are the narrow side of
the product (padded to 16), weight rows the wide one. Down walks the units as consecutive segments of one long K, as
the experts are slices of one matrix, so a token's sum is made in registers: no slots, no atomics, a fixed order.
Compare FlashInfer's pair of kernels for pre-routed M <= 8 (2026).

Shape letters: T tokens (at most 8), D hidden width, M expert width (padded), S slots, E units (shared ones first),
K routed columns, J = shared + K columns.
"""

# ruff: noqa: ANN001, ANN201
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from pregate.kernels.triton.tiled import activate

#: Rows that the tokens are padded to: the narrowest operand of a tensor-core product.
MAX_TOKENS = 8
PADDED_TOKENS = 16
#: Gate rows (and as many up rows) in one program's weight tile.
HALF = 32


@triton.jit
def column_of_unit(ids_ptr, unit, T, K, NUM_SHARED: tl.constexpr, PADDED: tl.constexpr):
    """Column [PADDED] in which each token has `unit`, -1 where it has not. Shared units are the first columns.

    Example: ids [[4, 6], [6, -1]], one shared unit, unit 7 (routed expert 6): [2, 1, -1, ...].
    """
    tokens = tl.arange(0, PADDED)
    column = tl.where((tokens < T) & (unit < NUM_SHARED), unit, -1)
    for k in range(K):
        ids = tl.load(ids_ptr + tokens * K + k, mask=tokens < T, other=-1)
        # An id below 0 is a token without a k-th expert; it must not meet a shared unit's number.
        column = tl.where((ids >= 0) & (ids + NUM_SHARED == unit), NUM_SHARED + k, column)
    return column


@triton.jit(do_not_specialize=["T", "K"], do_not_specialize_on_alignment=["ids_ptr", "weights_ptr", "unit_slot_ptr"])
def decode_gate_up_kernel(
    x_ptr,  # [T, D]
    w_ptr,  # [S * 2M, D]
    scale_ptr,  # fp32 [S * 2M], read only if SCALED
    h_ptr,  # [T, J, M]
    ids_ptr,  # int32 [T, K], -1 for none
    weights_ptr,  # fp32 [T, K], read only if WEIGHTED
    unit_slot_ptr,  # int32 [E], -1 absent
    T,
    D,
    M,
    K,
    NUM_SHARED: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr,
    PADDED: tl.constexpr,
    HALF_N: tl.constexpr,
):
    """(C, first half) h[t, j] = act(gate) * up * weight for the unit in column j of token t; grid (E, M / HALF_N).

    HALF_N gate rows and their HALF_N up rows make one weight tile, one product. A unit nobody uses ends at once.
    Row order: none; token t keeps row t. Example: ids [[2], [2]] with no shared unit run unit 2's programs only.
    """
    unit = tl.program_id(0)
    column = column_of_unit(ids_ptr, unit, T, K, NUM_SHARED, PADDED)
    if tl.max(column, 0) >= 0:
        slot_or_absent = tl.load(unit_slot_ptr + unit)
        slot = tl.maximum(slot_or_absent, 0).to(tl.int64)
        tokens = tl.arange(0, PADDED)
        n0 = tl.program_id(1) * HALF_N
        r = tl.arange(0, 2 * HALF_N)
        w_rows = slot * 2 * M + n0 + tl.where(r < HALF_N, r, M + r - HALF_N)
        acc = tl.zeros((2 * HALF_N, PADDED), tl.float32)
        for k0 in range(0, D, BLOCK_K):
            ks = k0 + tl.arange(0, BLOCK_K)
            k_ok = (ks < D)[None, :]
            x = tl.load(x_ptr + tokens[:, None] * D + ks[None, :], mask=(tokens < T)[:, None] & k_ok, other=0.0)
            weight = tl.load(w_ptr + w_rows[:, None] * D + ks[None, :], mask=k_ok, other=0.0)
            acc = tl.dot(weight.to(x.dtype), tl.trans(x), acc, input_precision="ieee")
        if SCALED:
            acc = acc * tl.load(scale_ptr + w_rows)[:, None]
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, HALF_N, PADDED)), (1, 2, 0)))
        h = tl.trans(activate(gate, ACT) * up)
        if WEIGHTED:
            routed = column >= NUM_SHARED
            k_of = tl.where(routed, column - NUM_SHARED, 0)
            h = h * tl.load(weights_ptr + tokens * K + k_of, mask=routed, other=1.0)[:, None]
        h = tl.where(slot_or_absent < 0, float("nan"), h)
        rows = tokens * (NUM_SHARED + K) + column
        h_ptrs = h_ptr + rows[:, None] * M + n0 + tl.arange(0, HALF_N)[None, :]
        tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=(column >= 0)[:, None])


@triton.jit(do_not_specialize=["T", "K", "E"], do_not_specialize_on_alignment=["ids_ptr", "unit_slot_ptr"])
def decode_down_kernel(
    h_ptr,  # [T, J, M]
    w_ptr,  # [S * D, M]
    scale_ptr,  # fp32 [S * D], read only if SCALED
    out_ptr,  # [T, D]
    ids_ptr,  # int32 [T, K], -1 for none
    unit_slot_ptr,  # int32 [E], -1 absent
    T,
    D,
    M,
    K,
    E,
    NUM_SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr,
    PADDED: tl.constexpr,
):
    """(C, second half) out[t] = the sum over token t's units, in ascending unit order; grid (D / BLOCK_N).

    A token with an id that is no expert gets NaN. Row order: none.
    Example: ids [[0, 2]], no shared unit: out = down_0 h[0, 0] + down_2 h[0, 1]; units 1 and 3 are skipped.
    """
    tokens = tl.arange(0, PADDED)
    ns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = ns < D
    out = tl.zeros((BLOCK_N, PADDED), tl.float32)
    for k in range(K):
        ids = tl.load(ids_ptr + tokens * K + k, mask=tokens < T, other=-1)
        out = tl.where(((ids < -1) | (ids >= E - NUM_SHARED))[None, :], float("nan"), out)
    for unit in range(E):
        column = column_of_unit(ids_ptr, unit, T, K, NUM_SHARED, PADDED)
        if tl.max(column, 0) >= 0:
            slot_or_absent = tl.load(unit_slot_ptr + unit)
            slot = tl.maximum(slot_or_absent, 0).to(tl.int64)
            h_rows = h_ptr + (tokens * (NUM_SHARED + K) + column)[:, None] * M
            w_rows = w_ptr + (slot * D + ns)[:, None] * M
            acc = tl.zeros((BLOCK_N, PADDED), tl.float32)
            for k0 in range(0, M, BLOCK_K):
                ks = k0 + tl.arange(0, BLOCK_K)
                k_ok = (ks < M)[None, :]
                h = tl.load(h_rows + ks[None, :], mask=(column >= 0)[:, None] & k_ok, other=0.0)
                weight = tl.load(w_rows + ks[None, :], mask=n_ok[:, None] & k_ok, other=0.0)
                acc = tl.dot(weight.to(h.dtype), tl.trans(h), acc, input_precision="ieee")
            if SCALED:
                acc = acc * tl.load(scale_ptr + slot * D + ns, mask=n_ok, other=0.0)[:, None]
            acc = tl.where((column >= 0)[None, :] & (slot_or_absent < 0), float("nan"), acc)
            out += acc
    out_ptrs = out_ptr + tokens[:, None] * D + ns[None, :]
    tl.store(out_ptrs, tl.trans(out).to(out_ptr.dtype.element_ty), mask=(tokens < T)[:, None] & n_ok[None, :])
