"""What a store of units notes of a unit on its way into a slot, and of where it may go.

Shape letters: L layers, R routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pregate.workers.host.next_use import Unit
from pregate.workers.host.slots import SlotPool


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
