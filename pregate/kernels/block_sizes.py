"""Block sizes of the Triton kernels: a rule picks the row, a small table per device says the rest.

The table is `block_sizes.json`, which `pregate bench kernels --tune` rewrites; serving never tunes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pregate.base.errors import UserError

TABLE_PATH = Path(__file__).with_name("block_sizes.json")
#: Row of the table that serves a device without one of its own.
DEFAULT_DEVICE = "sm_90"
KERNELS = ("gate_up", "down", "decode_gate_up", "decode_down")
BLOCK_MS = (16, 32, 64, 128)


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
    def load(cls, device: str, path: Path = TABLE_PATH) -> BlockTable:
        """Read the table of `device` (a name as torch gives it), else the default one; UserError if it is damaged."""
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
