"""Triton kernels of the expert FFN over expert-sorted rows: (A) gate-up, (B) down, and the sum over a token's experts.

Row order: rows are sorted by unit, within a unit by token; a tile list (`segments.py`) cuts them into runs of at most
BLOCK_M rows of one unit. Weights are read through `unit_slot`, so a cache may hold any unit in any slot.
Design: the study `kernels.md`, sections 1 and 7; the column-major order of tiles is PyTorch's "locality aware" design
(2024), the swapped operands are vLLM's and SGLang's swap-AB, the gather inside the product is ScatterMoE's.

Shape letters: T tokens, P rows (token, unit), D hidden width, M expert width (padded), S slots, E units, J columns
(a token's units, shared ones first). Plain-torch twins: `reference.gated_hidden`, `reference.expert_ffn`.
"""

# Kernels are typed by what they are launched with; a branch of a compile-time constant must be a statement.
# ruff: noqa: ANN001, ANN201, SIM108
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(gate, ACT: tl.constexpr):
    """Gate activation in fp32: "silu", "gelu" (exact) or "gelu_pytorch_tanh". Example: silu(0) = 0."""
    if ACT == "silu":
        out = gate * tl.sigmoid(gate)
    elif ACT == "gelu":
        out = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # tanh(z) = 2 sigmoid(2 z) - 1
        out = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return out


@triton.jit
def weight_tile(w, row0, k0, num_rows, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """Load [BLOCK_N, BLOCK_K] of a weight matrix [*, K] from (row0, k0); zero past column K and past `num_rows` rows.

    With TMA the box may run into the rows after `num_rows`; they only meet outputs that are not stored.
    """
    if TMA:
        tile = w.load([row0, k0])
    else:
        rows = tl.arange(0, BLOCK_N)
        ks = k0 + tl.arange(0, BLOCK_K)
        mask = (rows < num_rows)[:, None] & (ks < K)[None, :]
        tile = tl.load(w + (row0.to(tl.int64) + rows)[:, None] * K + ks[None, :], mask=mask, other=0.0)
    return tile


#: Index arrays are slices of a step's buffers and start anywhere: their alignment must not be compiled in, or a kernel
#: would be compiled anew while serving. Likewise counts that change from step to step.
INDEX_ARRAYS = ("row_token_ptr", "row_weight_ptr", "tiles_ptr", "num_tiles_ptr", "unit_slot_ptr")


@triton.jit(do_not_specialize_on_alignment=INDEX_ARRAYS)
def gate_up_kernel(
    x_ptr,  # [T, D]
    w,  # [S * 2M, D] pointer or TMA descriptor
    scale_ptr,  # fp32 [S * 2M] per weight row, read only if SCALED
    h_ptr,  # [P, M]
    row_token_ptr,  # int32 [P]
    row_weight_ptr,  # fp32 [P] routing weights, read only if WEIGHTED
    tiles_ptr,  # int32 [tiles, 3]: unit, first row, end row
    num_tiles_ptr,  # int32 [1]
    unit_slot_ptr,  # int32 [E], -1 absent
    D,
    M,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr,
):
    """(A) h[p] = act(gate) * up * weight of x[row_token[p]]; a persistent grid walks (weight columns, tiles).

    All tiles meet one block of weight columns before the next begins, so that the tiles of an expert read it from L2.
    An absent unit gives NaN. Example: rows of unit 1 are 2..4, BLOCK_M = 2: tiles [1, 2, 4] and [1, 4, 5].
    """
    num_tiles = tl.load(num_tiles_ptr)
    num_columns = tl.cdiv(M, BLOCK_N)
    for work in range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0)):
        tile_ptr = tiles_ptr + 3 * (work % num_tiles)
        n0 = (work // num_tiles) * BLOCK_N
        slot_or_absent = tl.load(unit_slot_ptr + tl.load(tile_ptr))
        slot = tl.maximum(slot_or_absent, 0)
        rows = tl.load(tile_ptr + 1) + tl.arange(0, BLOCK_M)
        row_ok = rows < tl.load(tile_ptr + 2)
        tokens = tl.load(row_token_ptr + rows, mask=row_ok, other=0).to(tl.int64)
        gate_row = slot * 2 * M + n0
        if SWAP:
            gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, D, BLOCK_K):
            ks = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + tokens[:, None] * D + ks[None, :], mask=row_ok[:, None] & (ks < D)[None, :], other=0.0)
            gate_w = weight_tile(w, gate_row, k0, M - n0, D, BLOCK_N, BLOCK_K, TMA).to(x.dtype)
            up_w = weight_tile(w, gate_row + M, k0, M - n0, D, BLOCK_N, BLOCK_K, TMA).to(x.dtype)
            if SWAP:
                x_KM = tl.trans(x)
                gate = tl.dot(gate_w, x_KM, gate, input_precision="ieee")
                up = tl.dot(up_w, x_KM, up, input_precision="ieee")
            else:
                gate = tl.dot(x, tl.trans(gate_w), gate, input_precision="ieee")
                up = tl.dot(x, tl.trans(up_w), up, input_precision="ieee")
        if SWAP:
            gate = tl.trans(gate)
            up = tl.trans(up)
        ns = n0 + tl.arange(0, BLOCK_N)
        n_ok = ns < M
        if SCALED:
            gate = gate * tl.load(scale_ptr + slot * 2 * M + ns, mask=n_ok, other=0.0)[None, :]
            up = up * tl.load(scale_ptr + slot * 2 * M + M + ns, mask=n_ok, other=0.0)[None, :]
        h = activate(gate, ACT) * up
        if WEIGHTED:
            h = h * tl.load(row_weight_ptr + rows, mask=row_ok, other=0.0)[:, None]
        h = tl.where(slot_or_absent < 0, float("nan"), h)
        h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * M + ns[None, :]
        tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=row_ok[:, None] & n_ok[None, :])


@triton.jit(do_not_specialize_on_alignment=INDEX_ARRAYS)
def down_kernel(
    h_ptr,  # [P, M]
    w,  # [S * D, M] pointer or TMA descriptor
    scale_ptr,  # fp32 [S * D] per weight row, read only if SCALED
    y_ptr,  # [P, D]
    tiles_ptr,  # int32 [tiles, 3]: unit, first row, end row
    num_tiles_ptr,  # int32 [1]
    unit_slot_ptr,  # int32 [E], -1 absent
    D,
    M,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    SCALED: tl.constexpr,
):
    """(B) y[p] = h[p] through its unit's down matrix, stored at row p.

    The store is deterministic: row p has one writer. Same order of tiles as (A). Example: rows 0, 1 of token 0 and
    row 2 of token 1 give y[0], y[1], y[2].
    """
    num_tiles = tl.load(num_tiles_ptr)
    num_columns = tl.cdiv(D, BLOCK_N)
    for work in range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0)):
        tile_ptr = tiles_ptr + 3 * (work % num_tiles)
        n0 = (work // num_tiles) * BLOCK_N
        slot_or_absent = tl.load(unit_slot_ptr + tl.load(tile_ptr))
        slot = tl.maximum(slot_or_absent, 0)
        rows = tl.load(tile_ptr + 1) + tl.arange(0, BLOCK_M)
        row_ok = rows < tl.load(tile_ptr + 2)
        h_rows = h_ptr + rows.to(tl.int64)[:, None] * M
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, M, BLOCK_K):
            ks = k0 + tl.arange(0, BLOCK_K)
            h = tl.load(h_rows + ks[None, :], mask=row_ok[:, None] & (ks < M)[None, :], other=0.0)
            down_w = weight_tile(w, slot * D + n0, k0, D - n0, M, BLOCK_N, BLOCK_K, TMA).to(h.dtype)
            if SWAP:
                acc = tl.dot(down_w, tl.trans(h), acc, input_precision="ieee")
            else:
                acc = tl.dot(h, tl.trans(down_w), acc, input_precision="ieee")
        if SWAP:
            acc = tl.trans(acc)
        ns = n0 + tl.arange(0, BLOCK_N)
        n_ok = ns < D
        if SCALED:
            acc = acc * tl.load(scale_ptr + slot * D + ns, mask=n_ok, other=0.0)[None, :]
        acc = tl.where(slot_or_absent < 0, float("nan"), acc)
        mask = row_ok[:, None] & n_ok[None, :]
        y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * D + ns[None, :]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["row_of_ptr"], do_not_specialize=["J"])
def sum_kernel(
    y_ptr,  # [P, D]
    row_of_ptr,  # int32 [T, J]: row of each of a token's units, -1 for none, -2 for an id that is no expert
    out_ptr,  # [T, D]
    D,
    J,
    BLOCK_D: tl.constexpr,
):
    """out[t] = the sum in fp32 of y[row_of[t, j]], in column order, so that the result never varies; NaN with a -2.

    Example: row_of [[0, 2], [1, -1]] gives out = [y[0] + y[2], y[1]].
    """
    token = tl.program_id(0)
    ds = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for column in range(J):
        row = tl.load(row_of_ptr + token * J + column)
        width = tl.where(row < 0, 0, D)
        y_ptrs = y_ptr + tl.maximum(row, 0).to(tl.int64) * D + ds
        acc += tl.load(y_ptrs, mask=ds < width, other=0.0).to(tl.float32)
        acc = tl.where(row < -1, float("nan"), acc)
    tl.store(out_ptr + token.to(tl.int64) * D + ds, acc.to(out_ptr.dtype.element_ty), mask=ds < D)
