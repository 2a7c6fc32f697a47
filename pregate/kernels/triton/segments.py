"""`segments.build` on a device: one launch for all layers, fixed-size buffers, counts left on the device.

Nothing waits for the host and the grid depends on shapes only, so the launch can be captured in a CUDA graph.
Plain twin: `segments.build`. Shape letters: T tokens, L layers, K experts per token, J = shared + K, E units,
P = T * J rows at most.
"""

# ruff: noqa: ANN001, ANN201
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pregate.kernels.segments import Segments, max_tiles

#: Pairs that a program looks at in one go.
PAIRS_PER_LOOK = 256


@triton.jit(do_not_specialize=["T", "L", "K", "E", "max_tiles"])
def segments_kernel(
    ids_ptr,  # int32 [T, L, K], -1 for none
    row_token_ptr,  # int32 [L, P]
    row_pair_ptr,  # int32 [L, P]
    row_of_ptr,  # int32 [L, T, J], filled with -1
    offsets_ptr,  # int32 [L, E + 1]
    tiles_ptr,  # int32 [L, max_tiles, 3]
    num_tiles_ptr,  # int32 [L]
    bad_ids_ptr,  # int32 [L]
    T,
    L,
    K,
    E,
    max_tiles,
    NUM_SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_E: tl.constexpr,
):
    """Program (layer, unit) counts all units of its layer, then writes its own unit's rows, in token order, and tiles.

    Counting is repeated by every unit's program, which is cheaper than a second launch: ids are a few KB and in L2.
    Unit 0's program also counts the ids that are no expert and gives their places the row -2, which the sum makes NaN.
    Example: T = 2, K = 2, ids [[0, 2], [2, -1]], no shared unit: program of unit 2 finds counts [1, 0, 2], starts at
    row 1 and writes row_token[1:3] = [0, 1], row_of[0, 1] = 1, row_of[1, 0] = 2.
    """
    layer = tl.program_id(0)
    unit = tl.program_id(1)
    J = NUM_SHARED + K
    units = tl.arange(0, PADDED_E)
    counts = tl.where(units < NUM_SHARED, T, 0)
    num_bad = 0
    for pair0 in range(0, T * K, BLOCK):
        pairs = pair0 + tl.arange(0, BLOCK)
        id_ptrs = ids_ptr + (pairs // K) * (L * K) + layer * K + pairs % K
        ids = tl.load(id_ptrs, mask=pairs < T * K, other=-1)
        mine = tl.where((ids >= 0) & (ids < E - NUM_SHARED), ids + NUM_SHARED, -1)
        counts += tl.sum((mine[:, None] == units[None, :]).to(tl.int32), 0)
        if unit == 0:
            bad = (ids < -1) | (ids >= E - NUM_SHARED)
            num_bad += tl.sum(bad.to(tl.int32), 0)
            places = (pairs // K) * J + NUM_SHARED + pairs % K
            tl.store(row_of_ptr + layer * (T * J) + places, -2, mask=bad)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    start = tl.sum(tl.where(units < unit, counts, 0), 0)
    count = tl.sum(tl.where(units == unit, counts, 0), 0)
    tl.store(offsets_ptr + layer * (E + 1) + unit, start)
    if unit == 0:
        tl.store(bad_ids_ptr + layer, num_bad)
    if unit == E - 1:
        tl.store(offsets_ptr + layer * (E + 1) + E, start + count)
        tl.store(num_tiles_ptr + layer, tl.sum(tiles, 0))
    first_tile = layer * max_tiles + tl.sum(tl.where(units < unit, tiles, 0), 0)
    for n in range(0, tl.cdiv(count, BLOCK_M)):
        tile_ptr = tiles_ptr + 3 * (first_tile + n)
        tl.store(tile_ptr, unit)
        tl.store(tile_ptr + 1, start + n * BLOCK_M)
        tl.store(tile_ptr + 2, start + tl.minimum(count, (n + 1) * BLOCK_M))
    rows0 = layer * (T * J)
    if unit < NUM_SHARED:
        for token0 in range(0, T, BLOCK):
            tokens = token0 + tl.arange(0, BLOCK)
            ok = tokens < T
            tl.store(row_token_ptr + rows0 + start + tokens, tokens, mask=ok)
            tl.store(row_pair_ptr + rows0 + start + tokens, tokens * J + unit, mask=ok)
            tl.store(row_of_ptr + rows0 + tokens * J + unit, start + tokens, mask=ok)
    else:
        row = start
        for pair0 in range(0, T * K, BLOCK):
            pairs = pair0 + tl.arange(0, BLOCK)
            tokens = pairs // K
            columns = NUM_SHARED + pairs % K
            ids = tl.load(ids_ptr + tokens * (L * K) + layer * K + pairs % K, mask=pairs < T * K, other=-1)
            hit = ids == unit - NUM_SHARED
            rows = row + tl.cumsum(hit.to(tl.int32), 0) - 1
            tl.store(row_token_ptr + rows0 + rows, tokens, mask=hit)
            tl.store(row_pair_ptr + rows0 + rows, tokens * J + columns, mask=hit)
            tl.store(row_of_ptr + rows0 + tokens * J + columns, rows, mask=hit)
            row += tl.sum(hit.to(tl.int32), 0)


def build_on_device(ids_TLK: torch.Tensor, num_routed: int, *, num_shared: int, block_m: int) -> Segments:
    """`segments.build` where `ids_TLK` (int32) lives: one launch after the buffers are cleared, no wait.

    Ids are data here: callers with ids from a device ask `Segments.check_ids`; serving checks them on the host.
    """
    num_tokens, num_layers, num_k = ids_TLK.shape
    num_units, num_columns = num_shared + num_routed, num_shared + num_k
    num_rows = num_tokens * num_columns
    size = max_tiles(num_rows, num_units, block_m)

    def full(value: int, *shape: int) -> torch.Tensor:
        return torch.full(shape, value, dtype=torch.int32, device=ids_TLK.device)

    built = Segments(
        num_shared=num_shared,
        block_m=block_m,
        row_token=full(0, num_layers, num_rows),
        row_pair=full(0, num_layers, num_rows),
        row_of=full(-1, num_layers, num_tokens, num_columns),
        offsets=full(0, num_layers, num_units + 1),
        tiles=full(0, num_layers, size, 3),
        num_tiles=full(0, num_layers),
        ids_TLK=ids_TLK.contiguous(),
        bad_ids=full(0, num_layers),
    )
    launch: Any = segments_kernel[(num_layers, num_units)]
    rows = (built.ids_TLK, built.row_token, built.row_pair, built.row_of)
    counts = (built.offsets, built.tiles, built.num_tiles, built.bad_ids)
    constants = {"NUM_SHARED": num_shared, "BLOCK_M": block_m, "BLOCK": PAIRS_PER_LOOK}
    constants["PADDED_E"] = triton.next_power_of_2(num_units)
    launch(*rows, *counts, num_tokens, num_layers, num_k, num_units, size, **constants)
    return built
