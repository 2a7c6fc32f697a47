"""What a step does besides products, as kernels compiled for the CPU: norms, rotation, the KV cache and attention.

Shape letters: T rows of a step, A rows that attend, D hidden width, H = Q + 2 G heads of a row (queries, keys, values),
E head width, R rotated width, S slots of the cache, B block tables, N blocks of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepKernels:
    """All take contiguous NumPy arrays in fp32, indexes in int64, and return nothing. One thread runs each. Their
    twins in plain torch, which return what these write: `reference.py`.

    rms_norm(x_TD, weight_D, eps, out_TD)
        out = x / rms(x) * weight
    add_rms_norm(x_TD, more_TD, weight_D, eps, out_TD)
        x += more first, in place
    place(heads_THE, cos_TR, sin_TR, slot_T, keys_SGE, values_SGE)
        rotates queries and keys in place (`sin_TR` has the first half of its columns negated), then stores keys and
        values in their slots, what is not finite as 0
    attend(q_THE, keys_SGE, values_SGE, length_A, table_A, block_BN, block_size, scaling, window, softcap, out_TQE)
        lets the first A rows attend: row a, whose queries are the first Q heads of `q_THE[a]`, to the first
        `length_A[a]` tokens of the context in blocks `block_BN[table_A[a]]`, of these the last `window` (0: all);
        `softcap` 0 for none. A row reads nothing else of the cache, and is the same bits whatever is beside it

    Example of `attend`: lengths [3, 17], tables [1, 0], blocks [[4, 2], [7, 0]] of 16: row 0 reads slots 112 to 114,
    row 1 reads 64 to 79 and 32.
    """

    rms_norm: Callable[..., None]
    add_rms_norm: Callable[..., None]
    place: Callable[..., None]
    attend: Callable[..., None]


def step_kernels(device: str | torch.device, dtype: torch.dtype) -> StepKernels | None:
    """The kernels of a CPU in fp32, compiled when this is first called; None elsewhere, where torch's operations serve.

    numba is imported here and not above: it takes memory that hosts, doors and the supervisor have no use for.
    """
    if torch.device(device).type != "cpu" or dtype != torch.float32:
        return None
    from pregate.kernels.cpu import attention, norm

    return StepKernels(norm.rms_norm, norm.add_rms_norm, attention.place, attention.attend)
