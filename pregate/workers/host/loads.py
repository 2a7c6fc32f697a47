"""What a store of units counts, and what it notes of a unit on its way into a slot.

Shape letters: L layers, R routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pregate.workers.host.next_use import Unit
from pregate.workers.host.slots import SlotPool


@dataclass
class StoreStats:
    """Counters since the start. `read_bytes` is in the checkpoint's dtype, `held_bytes` as held in memory.

    A use of a unit is a hit where it was in its slot when it was wanted, else a miss; compute waited `stall_s` for
    those. `wasted_bytes` of the `prefetched_bytes` left again unused. `num_pending`: units to fetch, now.
    """

    num_units: int = 0
    units_read: int = 0
    read_bytes: int = 0
    held_bytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    prefetched_bytes: int = 0
    wasted_bytes: int = 0
    stall_s: float = 0.0
    num_pending: int = 0


@dataclass(frozen=True)
class Load:
    """A unit on its way into a slot."""

    unit: Unit
    pool: SlotPool
    slot: int
    ahead: bool


@dataclass(frozen=True, eq=False)
class Room:
    """A pool, the units [L, R] whose width it is of, and how many of them it may hold: shared units have slots too."""

    pool: SlotPool
    mask_LR: np.ndarray
    num_slots: int
