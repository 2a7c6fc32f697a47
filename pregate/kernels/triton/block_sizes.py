"""Block sizes of the Triton kernels: a rule picks the row, a small table per device says the rest.

The table is `block_sizes.json`, which `pregate bench kernels --tune` rewrites; serving never tunes. A device without a
row gets the default one, cut down to the shared memory it has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pregate.base.errors import UserError
from pregate.base.log import get_logger

TABLE_PATH = Path(__file__).with_name("block_sizes.json")
#: Row of the table that serves a device without one of its own.
DEFAULT_DEVICE = "sm_90"
KERNELS = ("gate_up", "down", "decode_gate_up", "decode_down")
BLOCK_MS = (16, 32, 64, 128)
#: The shortest pipeline that overlaps loads and products, and the shortest block along K that is worth a product.
MIN_STAGES, MIN_BLOCK_K = 2, 32
#: Bytes of the widest type the table serves (fp32 has blocks of its own), and of a stage's barrier.
ITEM_BYTES, BARRIER_BYTES = 2, 8

_log = get_logger(__name__)


@dataclass(frozen=True)
class BlockSizes:
    """One launch: block edges in elements, warps, pipeline stages; `swap` puts weight rows on the wide side.

    `programs_per_sm` sizes the persistent grid.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    programs_per_sm: int = 1

    def __post_init__(self) -> None:
        for name in ("block_n", "block_k", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise UserError.of(name, value, "must be a power of two")


@dataclass(frozen=True)
class BlockTable:
    """Sizes of every kernel on one device: `by_rows[kernel][block_m]`; the decode kernels have the one row 16."""

    device: str
    by_rows: Mapping[str, Mapping[int, BlockSizes]]

    def sizes(self, kernel: str, block_m: int) -> BlockSizes:
        return self.by_rows[kernel][block_m]

    @classmethod
    def load(cls, device: str, path: Path = TABLE_PATH, *, max_shared_bytes: int | None = None) -> BlockTable:
        """Read the row of `device` (a name as torch gives it), else the default one; UserError if it is damaged.

        `max_shared_bytes`, what one block may have on this device, cuts the default row (see `fit`) and logs the cut.
        """
        table = cls._read(device, path)
        if max_shared_bytes is None or table.device == device:
            return table
        rows = {
            kernel: {block_m: fit(kernel, block_m, sizes, max_shared_bytes) for block_m, sizes in by_block_m.items()}
            for kernel, by_block_m in table.by_rows.items()
        }
        cut = [f"{kernel} {m}" for kernel in KERNELS for m in rows[kernel] if rows[kernel][m] != table.sizes(kernel, m)]
        _log.info(
            "no block sizes for %s: those of %s, cut to %d bytes of shared memory: %s; "
            "`pregate bench kernels --tune --device cuda` finds better ones",
            *(device, table.device, max_shared_bytes, ", ".join(cut) or "all fit"),
        )
        return cls(table.device, rows)

    @classmethod
    def _read(cls, device: str, path: Path) -> BlockTable:
        try:
            tables = json.loads(path.read_text())
            name = device if device in tables else DEFAULT_DEVICE
            rows = {
                kernel: {int(block_m): BlockSizes(**fields) for block_m, fields in tables[name][kernel].items()}
                for kernel in KERNELS
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a table of block sizes ({error!r})") from error
        return cls(name, rows)

    def save(self, path: Path = TABLE_PATH) -> None:
        """Write this device's row into the file at `path`, beside the others."""
        tables = json.loads(path.read_text()) if path.exists() else {}
        tables[self.device] = {
            kernel: {str(block_m): asdict(sizes) for block_m, sizes in rows.items()}
            for kernel, rows in self.by_rows.items()
        }
        path.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")


def shared_bytes(kernel: str, block_m: int, sizes: BlockSizes) -> int:
    """Shared memory of a launch in 16-bit types: per stage a block of rows, one of weights (gate-up: two), a barrier.

    What the compiler reports; a test holds it for every row of the table.

    Example: gate_up, 128 rows, blocks 64 x 64, 4 stages: 4 * ((128 + 2 * 64) * 64 * 2 + 8) = 131104.
    """
    weight_rows = sizes.block_n * (2 if kernel == "gate_up" else 1)
    return sizes.num_stages * ((block_m + weight_rows) * sizes.block_k * ITEM_BYTES + BARRIER_BYTES)


def fit(kernel: str, block_m: int, sizes: BlockSizes, max_shared_bytes: int) -> BlockSizes:
    """Return `sizes` with fewer stages, then shorter blocks along K, until a launch fits `max_shared_bytes`.

    UserError where nothing fits. Example: gate_up, 128 rows, blocks 64 x 64, 4 stages in 101376 bytes: 3 stages.
    """
    while shared_bytes(kernel, block_m, sizes) > max_shared_bytes:
        if sizes.num_stages > MIN_STAGES:
            sizes = replace(sizes, num_stages=sizes.num_stages - 1)
        elif sizes.block_k > MIN_BLOCK_K:
            sizes = replace(sizes, block_k=sizes.block_k // 2)
        else:
            raise UserError.of(kernel, block_m, f"no block sizes fit {max_shared_bytes} bytes of shared memory")
    return sizes


def block_m_for(num_rows: int, num_units: int) -> int:
    """Rows per tile for `num_rows` rows over `num_units` units (means; kernels.md, sections 1.1 and 7).

    Few rows: the power of two above twice the mean, 16 to 64, so that weights are not loaded twice. Else 64, and
    128 above 400, where the padding of short tiles no longer costs.

    Example: means 1, 9, 37, 300, 500 give 16, 32, 64, 64, 128.
    """
    mean = num_rows / max(num_units, 1)
    if mean > 400:
        return 128
    return min(max(1 << max(int(2 * mean) - 1, 0).bit_length(), 16), 64)
