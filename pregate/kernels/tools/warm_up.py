"""Calls an implementation at every batch size where another kernel would be compiled, so that no request waits for one.

Which kernel runs, and in which blocks, depends on the rows per unit (`ExpertFFN.block_m`) and on whether a batch is a
decode batch; everything else that is compiled in (widths, dtype, activation) is the model's. Only implementations that
say `compiles` gain from it. Nothing is tuned here, and no call waits for the device.

Shape letters: T tokens, N rows, K experts per token, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from pregate.kernels.contract import ExpertFFN
from pregate.kernels.units import GroupRows, LayerUnits

#: The largest batch that may be a decode batch (`triton_decode.MAX_TOKENS`; importing that needs Triton).
DECODE_TOKENS = 8


def warm_up_pairs(ffn: ExpertFFN, weights: Any, x_1D: torch.Tensor, most: int) -> int:
    """Run `ffn.pairs` on groups of 1 to `most` rows, once per block size; return the number of calls.

    `x_1D` is any row, where and as serving has them; `weights` are any stack in whose slot 0 something lies.
    """
    sizes = _first_sizes(ffn, range(1, most + 1), num_units=1, columns=[1])
    for num_rows, _ in sizes:
        rows = GroupRows(np.zeros(1, np.int32), np.array([num_rows]), np.arange(num_rows, dtype=np.int32))
        ffn.pairs(x_1D.expand(num_rows, -1), rows, weights)
    return len(sizes)


def warm_up_dense(ffn: ExpertFFN, weights: Any, x_1D: torch.Tensor, most: int) -> int:
    """Run `ffn.dense` on 1 to `most` tokens, as `warm_up_pairs`."""
    sizes = [(1, 1), *_first_sizes(ffn, range(DECODE_TOKENS + 1, most + 1), num_units=1, columns=[1])]
    for num_tokens, _ in sizes:
        ffn.dense(x_1D.expand(num_tokens, -1), weights)
    return len(sizes)


def warm_up_layer(
    ffn: ExpertFFN, units: LayerUnits, num_shared: int, x_1D: torch.Tensor, most: int, *, weighted: bool = False
) -> int:
    """Run `ffn.segments` and `ffn.layer` for 1 to `most` tokens with one and with all experts, as `warm_up_pairs`.

    `units` begin with the layer's `num_shared` shared units. `weighted`: experts weigh something else than 1.
    """
    num_units = len(units.unit_slot)
    num_routed = num_units - num_shared
    columns = [num_shared + 1, num_shared + num_routed]
    tokens = range(DECODE_TOKENS + 1, most + 1)
    sizes = [(1, columns[0]), *_first_sizes(ffn, tokens, num_units=num_units, columns=columns)]
    for num_tokens, num_columns in sizes:
        ids_K = torch.arange(num_columns - num_shared, dtype=torch.int32)
        ids_T1K = ids_K.expand(num_tokens, 1, -1)
        segments = ffn.segments(ids_T1K, num_routed, num_shared, torch.ones(ids_T1K.shape) if weighted else None)
        ffn.layer(x_1D.expand(num_tokens, -1), segments.layer(0), units)
    return len(sizes)


def _first_sizes(ffn: ExpertFFN, tokens: range, *, num_units: int, columns: Sequence[int]) -> list[tuple[int, int]]:
    """Return the smallest batch (tokens, columns) of each block size.

    Example: the Triton kernels' rule for one unit and one column: 1, 9, 17 and 401 tokens, in tiles of 16, 32, 64 and
    128 rows.
    """
    found: dict[int, tuple[int, int]] = {}
    for num_tokens, num_columns in product(tokens, columns):
        found.setdefault(ffn.block_m(num_tokens * num_columns, num_units), (num_tokens, num_columns))
    return list(found.values())
