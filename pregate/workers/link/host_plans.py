"""What one host is asked for: the identity of a group, its indexes, and the plan of a step. NumPy only.

Shape letters: N rows of a group, P (row, expert) pairs, U units used, L layers, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class GroupKey(NamedTuple):
    """Identity of one token group; a repeat is recognised by it and a stale answer refused.

    `engine` is the engine incarnation (hex). `attempt` counts resends of the same group.
    """

    engine: str
    step: int
    layer: int
    group: int
    attempt: int = 0

    def next_attempt(self) -> GroupKey:
        """Return the identity under which the same group is sent again."""
        return self._replace(attempt=self.attempt + 1)


@dataclass(frozen=True, eq=False)
class GroupIndex:
    """Which rows of a group visit which experts, expert by expert.

    `expert_ids` int32 [U] ascending; `counts` int32 [U] pairs per expert, all positive; `row_index` int32 [P],
    P = sum(counts): pair p reads row `row_index[p]` of the group's N rows. The answer has one row per pair, in
    this order.

    Example: rows a, b, c; a visits experts 1 and 4, b visits 4, c visits 1. Then expert_ids [1, 4],
    counts [2, 2], row_index [0, 2, 0, 1], and the answer is [E1(a), E1(c), E4(a), E4(b)].
    """

    expert_ids: np.ndarray
    counts: np.ndarray
    row_index: np.ndarray

    @property
    def num_pairs(self) -> int:
        return self.row_index.shape[0]

    def check(self, num_rows: int) -> None:
        """Raise ValueError unless the arrays describe pairs over exactly `num_rows` rows."""
        _check_arrays(self.expert_ids, self.counts, self.row_index)
        if self.expert_ids.shape != self.counts.shape or (self.counts < 1).any():
            raise ValueError("group index: needs one positive count per expert")
        if (np.diff(self.expert_ids) <= 0).any() or (self.expert_ids < 0).any():
            raise ValueError("group index: expert ids must ascend from 0 or more")
        if int(self.counts.sum()) != self.num_pairs:
            raise ValueError(f"group index: counts sum to {int(self.counts.sum())}, not {self.num_pairs} pairs")
        _check_range(self.row_index, num_rows)


@dataclass(frozen=True, eq=False)
class HostPlan:
    """Everything one host will be asked for in one step: a `GroupIndex` per layer, laid end to end.

    `num_rows` int32 [L]; layer l owns units `unit_offsets[l]:unit_offsets[l + 1]` of `expert_ids` and `counts`, and
    pairs `pair_offsets[l]:pair_offsets[l + 1]` of `row_index` (both offsets int32 [L + 1]). `traces` are the
    traceparents of requests in the step that are traced, a space between them.

    Example: two layers; three rows as in `GroupIndex` in layer 0, nothing in layer 1: num_rows [3, 0],
    unit_offsets [0, 2, 2], expert_ids [1, 4], counts [2, 2], pair_offsets [0, 4, 4], row_index [0, 2, 0, 1].
    """

    step: int
    num_rows: np.ndarray
    unit_offsets: np.ndarray
    expert_ids: np.ndarray
    counts: np.ndarray
    pair_offsets: np.ndarray
    row_index: np.ndarray
    traces: str = ""

    @property
    def num_layers(self) -> int:
        return self.num_rows.shape[0]

    @property
    def layer_of_unit(self) -> np.ndarray:
        """The layer of each of `expert_ids`."""
        return np.repeat(np.arange(self.num_layers), np.diff(self.unit_offsets))

    def layer(self, layer: int) -> GroupIndex:
        """Return views of one layer's arrays."""
        units = slice(self.unit_offsets[layer], self.unit_offsets[layer + 1])
        pairs = slice(self.pair_offsets[layer], self.pair_offsets[layer + 1])
        return GroupIndex(self.expert_ids[units], self.counts[units], self.row_index[pairs])

    def check(self) -> None:
        """Raise ValueError where offsets, counts, ids or rows contradict each other."""
        _check_arrays(self.num_rows, self.unit_offsets, self.expert_ids, self.counts, self.pair_offsets, self.row_index)
        _check_offsets("unit_offsets", self.unit_offsets, self.num_layers, self.expert_ids.shape[0])
        _check_offsets("pair_offsets", self.pair_offsets, self.num_layers, self.row_index.shape[0])
        if self.expert_ids.shape != self.counts.shape or (self.counts < 1).any():
            raise ValueError("plan: needs one positive count per unit")
        ends = np.concatenate(([0], np.cumsum(self.counts, dtype=np.int64)))
        if (ends[self.unit_offsets] != self.pair_offsets).any():
            raise ValueError("plan: counts of a layer do not sum to its pairs")
        falls = np.diff(self.expert_ids) <= 0
        if (falls & (np.diff(self.layer_of_unit) == 0)).any() or (self.expert_ids < 0).any():
            raise ValueError("plan: expert ids of a layer must ascend from 0 or more")
        _check_range(self.row_index, np.repeat(self.num_rows, np.diff(self.pair_offsets)))


def _check_arrays(*arrays: np.ndarray) -> None:
    for array in arrays:
        if array.dtype != np.int32 or array.ndim != 1:
            raise ValueError(f"indexes must be int32 [n], got {array.dtype} {list(array.shape)}")


def _check_offsets(name: str, offsets: np.ndarray, num_layers: int, total: int) -> None:
    if offsets.shape[0] != num_layers + 1 or offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 0).any():
        raise ValueError(f"plan: {name} must rise from 0 to {total} over {num_layers} layers")


def _check_range(row_index: np.ndarray, num_rows: np.ndarray | int) -> None:
    if (row_index < 0).any() or (row_index >= num_rows).any():
        raise ValueError("row index: a pair reads a row the group does not have")
