"""Finding block sizes by trial: every candidate of every row of the table is timed, the fastest is kept.

Run by `pregate bench kernels --tune`; nothing is tuned while serving.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pregate.base.errors import PregateError
from pregate.base.log import get_logger
from pregate.kernels import segments
from pregate.kernels.tools import bench
from pregate.kernels.tools.bench import DenseLayer, Shape
from pregate.kernels.triton import block_sizes
from pregate.kernels.triton.block_sizes import BlockSizes, BlockTable
from pregate.kernels.triton.ffn import TritonFFN

#: Gives the milliseconds of a call; inf if it cannot be launched.
Timer = Callable[[Callable[[], object]], float]

_log = get_logger(__name__)


def candidates(kernel: str, block_m: int) -> Iterator[BlockSizes]:
    """Sizes worth a trial. Rows of 16 and 32 put the weights on the wide side, as tensor cores want 64 there."""
    swap = block_m < 64
    block_ns = (64,) if kernel.startswith("decode") or swap else (64, 128, 256)
    for block_n, block_k, num_warps, num_stages, programs in itertools.product(
        block_ns, (32, 64, 128, 256), (4, 8), (2, 3, 4, 5, 6), (1, 2, 3)
    ):
        decode = kernel.startswith("decode")
        if (decode and programs > 1) or (not decode and block_k > 128) or (block_n == 256 and num_warps == 4):
            continue
        yield BlockSizes(block_n, block_k, num_warps, num_stages, swap and not decode, programs)


def time_on_device(call: Callable[[], object]) -> float:
    """Milliseconds of `call`, its weights cold in L2; inf if its blocks do not fit the device, and no other error."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        taken_ms: Any = do_bench(call, warmup=5, rep=30, return_mode="median")
    except OutOfResources:
        return float("inf")
    return float(taken_ms)


def tune(
    ffn: TritonFFN,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    timer: Timer = time_on_device,
    choices: Callable[[str, int], Iterator[BlockSizes]] = candidates,
) -> BlockTable:
    """Return the table of `ffn`'s device with the fastest sizes for `shape`, half of its FFN active."""
    layer = DenseLayer.random(shape, dtype, device, 0)
    units = layer.units(ffn)
    num_k = shape.num_active(50)
    rows = {kernel: dict(ffn.table.by_rows[kernel]) for kernel in block_sizes.KERNELS}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for kernel in block_sizes.KERNELS:
        for block_m in sorted(rows[kernel]):
            num_tokens = 1 if kernel.startswith("decode") else block_m * shape.num_experts // (2 * (num_k + 1)) + 9
            ids_TK = bench.route("uniform", num_tokens, shape.num_routed, num_k, torch.Generator().manual_seed(1))
            built = segments.build(ids_TK[:, None], shape.num_routed, num_shared=1, block_m=block_m)
            segment = built.to(device).layer(0)
            x_TD = torch.randn(num_tokens, shape.hidden, device=device, dtype=dtype)

            def trial(sizes: BlockSizes, kernel: str = kernel, block_m: int = block_m) -> Callable[[], object]:
                ffn.table = BlockTable(name, {**rows, kernel: {**rows[kernel], block_m: sizes}})
                return lambda: ffn.layer(x_TD, segment, units)  # noqa: B023 (called before the next turn)

            tried = list(choices(kernel, block_m))
            timed_ms = [timer(trial(sizes)) for sizes in tried]
            rows[kernel][block_m] = _fastest(f"{kernel}, {block_m} rows", tried, timed_ms)
    ffn.table = BlockTable(name, rows)
    return ffn.table


def _fastest(what: str, tried: list[BlockSizes], timed_ms: list[float]) -> BlockSizes:
    """Return the first of the fastest and log it, and each that did not fit; PregateError if none did."""
    for sizes, taken_ms in zip(tried, timed_ms, strict=True):
        if math.isinf(taken_ms):
            _log.warning("%s: %s does not fit this device; skipped", what, sizes)
    best_ms = min(timed_ms)
    if math.isinf(best_ms):
        raise PregateError(f"{what}: none of {len(tried)} block sizes fits this device")
    best = tried[timed_ms.index(best_ms)]
    _log.info("%s: %s, %.4f ms", what, best, best_ms)
    return best
