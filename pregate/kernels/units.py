"""Which units a call runs, and where their weights lie.

Shape letters: U units of a group, E units of a layer, P (row, unit) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pregate.base.errors import PregateError
from pregate.kernels.segments import Segment

SharedFFN = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class GroupRows:
    """Rows that visit experts, expert by expert. NumPy, on the host.

    `slots` int [U] where each expert's weights lie, in any order, -1 for nowhere; `counts` int [U], all positive;
    `row_index` int [P], P = sum(counts): pair p reads row `row_index[p]`. What is derived is kept; `made` is what an
    implementation's `prepare` made of it (for a device: the arrays there).
    """

    slots: np.ndarray
    counts: np.ndarray
    row_index: np.ndarray
    made: Any = None

    def derive(self) -> None:
        """Make now what is made when first asked for."""
        _ = self.in_order, self.index, self.slot_list, self.count_list

    @cached_property
    def slot_list(self) -> list[int]:
        """`slots`; PregateError if one of the units is nowhere."""
        check_present(self.slots, self.counts)
        return self.slots.tolist()

    @cached_property
    def count_list(self) -> list[int]:
        return self.counts.tolist()

    @cached_property
    def in_order(self) -> bool:
        """True where pair p reads row p."""
        last = len(self.row_index) - 1
        # Most groups show by their last pair that they are not: a row is read more than once.
        return bool(self.row_index[last] == last and (np.diff(self.row_index) == 1).all())

    @cached_property
    def index(self) -> torch.Tensor:
        """`row_index` for torch."""
        return torch.from_numpy(self.row_index)


@dataclass(frozen=True, eq=False)
class LayerUnits:
    """A layer's weights and the slot of each of its units, int32 [E], -1 for nowhere.

    `weights` are what the implementation's layout holds. `shared` runs the shared expert [T, D] -> [T, D] where it is
    held apart, as one wide FFN.
    """

    weights: Any
    unit_slot: np.ndarray
    shared: SharedFFN | None = None
    _on_device: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def slots_on(self, device: torch.device) -> torch.Tensor:
        """Return `unit_slot` on `device`, copied there once."""
        if device not in self._on_device:
            self._on_device[device] = torch.from_numpy(self.unit_slot).to(device)
        return self._on_device[device]

    @cached_property
    def has_gaps(self) -> bool:
        return bool((self.unit_slot < 0).any())

    @cached_property
    def slot_list(self) -> list[int]:
        return self.unit_slot.tolist()

    def check(self, segment: Segment, num_tokens: int) -> None:
        """ValueError if `segment` is of other units or tokens (a kernel would read past the map), PregateError if it
        uses a unit without a slot. A map without gaps costs nothing; one with gaps costs a wait for the device if the
        segment was built there."""
        self.check_sizes(segment.num_units, segment.num_tokens, num_tokens)
        if self.has_gaps:
            check_present(self.unit_slot, np.diff(segment.offsets.cpu().numpy()))

    def check_sizes(self, num_units: int, segment_tokens: int, num_tokens: int) -> None:
        """ValueError if a segment of `num_units` units and `segment_tokens` tokens is not of this layer and batch."""
        if (num_units, segment_tokens) != (len(self.unit_slot), num_tokens):
            found = f"{num_units} units and {segment_tokens} tokens"
            raise ValueError(f"segment of {found}; the layer has {len(self.unit_slot)} and {num_tokens}")


def check_present(slots: np.ndarray, counts: np.ndarray) -> None:
    """PregateError if a unit with rows has no slot."""
    absent = np.flatnonzero((slots < 0) & (counts > 0))
    if absent.size:
        raise PregateError(f"units {absent.tolist()} have rows but no slot: they are not held here")
