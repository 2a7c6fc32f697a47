"""Experts that overlap: which rows they share, and what a swap that moves only the others costs.

Two rows of a layer are the same weights when `neuron_index` names the same parent neuron, and the experts were not
trained apart (`tied`: not trained, or by `read-me` alone, unless `--no-tie-overlap`; `tune` trains them apart). A host
that swaps expert j for expert i then needs only the rows of i that j has not.

Shape letters: R routed experts, M expert width, I neurons of the dense FFN, U distinct rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pregate.model.config import LayerCut
from pregate.model.layers import RoutedMLP


@dataclass(frozen=True)
class SwapCost:
    """What it takes to put expert i where expert j was, in one layer, or (summed) in all: bytes.

    `full` moves the expert whole; `differing_RR[i, j]` only the rows of i that j has not.
    """

    full: int
    differing_RR: np.ndarray

    @property
    def mean_differing(self) -> float:
        """Mean of `differing_RR` over pairs of two experts; 0 with one expert."""
        num = len(self.differing_RR)
        return float(self.differing_RR.sum()) / max(1, num * (num - 1))

    @property
    def saved_share(self) -> float:
        """Share of a full move that is saved on average."""
        return 1 - self.mean_differing / self.full if self.full and len(self.differing_RR) > 1 else 0.0

    def describe(self) -> dict[str, Any]:
        return {
            "full_bytes": self.full,
            "mean_differing_bytes": round(self.mean_differing),
            "saved_share": round(self.saved_share, 4),
            "differing_bytes": self.differing_RR.tolist(),
        }


def routed_neurons(neuron_index: np.ndarray, cut: LayerCut) -> np.ndarray:
    """The parent neurons of each routed expert [R, M], from a layer's `neuron_index` (shared rows come first)."""
    return np.asarray(neuron_index, dtype=np.int64)[cut.shared_width :].reshape(cut.num_routed, cut.expert_width)


def differing_rows(routed_RM: np.ndarray) -> np.ndarray:
    """[R, R]: how many rows of expert i expert j has not; 0 on the diagonal.

    Example: experts [0, 1, 2], [1, 2, 3] and [4, 5, 6]: [[0, 1, 3], [1, 0, 3], [3, 3, 0]].
    """
    num_routed, width = routed_RM.shape
    has_RI = np.zeros((num_routed, routed_RM.max(initial=-1) + 1), dtype=np.int64)
    np.put_along_axis(has_RI, routed_RM, 1, axis=1)
    return width - has_RI @ has_RI.T


def swap_cost(neuron_index: np.ndarray, cut: LayerCut, row_bytes: int, tied: bool = True) -> SwapCost:
    """The cost in one layer, of whose rows each (gate, up and down together) is `row_bytes`.

    Experts that are not `tied` have no row in common.
    """
    neurons_RM = routed_neurons(neuron_index, cut)
    if not tied:
        neurons_RM = np.arange(neurons_RM.size).reshape(neurons_RM.shape)
    rows_RR = differing_rows(neurons_RM)
    return SwapCost(cut.expert_width * row_bytes, rows_RR * row_bytes)


def total_cost(layers: Sequence[SwapCost]) -> SwapCost:
    """The cost of swapping one index for another in every layer; the layers must have equally many experts."""
    return SwapCost(sum(c.full for c in layers), np.sum([c.differing_RR for c in layers], axis=0))


def coverage(neuron_index: np.ndarray, parent_width: int) -> float:
    """Share of the parent's neurons that some row still holds."""
    return len(np.unique(neuron_index)) / parent_width


def overlaps(neuron_index: np.ndarray) -> bool:
    """Whether two rows hold the same neuron; rows lie in any shape."""
    return len(np.unique(neuron_index)) < neuron_index.size


def overlap_figures(
    indexes: Sequence[np.ndarray], cuts: Sequence[LayerCut], widths: Sequence[int], row_bytes: int, tied: bool = True
) -> dict[str, Any]:
    """What a manifest keeps of a cut whose experts overlap: coverage, the permanent part, and swaps.

    `widths` are the dense FFNs'; `row_bytes` and `tied` as for `swap_cost`. Shares are by layer.
    """
    covered = [round(coverage(index, width), 4) for index, width in zip(indexes, widths, strict=True)]
    common = [len(permanent_rows(index, cut)) for index, cut in zip(indexes, cuts, strict=True)]
    stored = [len(index) / len(np.unique(index)) for index in indexes]
    return {
        "coverage": covered,
        "permanent_channels": common,
        "stored_rows_per_channel": round(float(np.mean(stored)), 4),
        "swap": swap_figures(indexes, cuts, row_bytes, tied),
    }


def bytes_per_row(hidden_size: int, item_bytes: int) -> int:
    """Bytes of one neuron as stored: a gate row, an up row and a down column."""
    return 3 * hidden_size * item_bytes


def swap_figures(
    indexes: Sequence[np.ndarray], cuts: Sequence[LayerCut], row_bytes: int, tied: bool = True
) -> dict[str, Any]:
    """What a manifest keeps of swaps: in bytes, of one index for another in every layer, and shares by layer."""
    layers = [swap_cost(index, cut, row_bytes, tied) for index, cut in zip(indexes, cuts, strict=True)]
    return total_cost(layers).describe() | {"saved_share_by_layer": [round(c.saved_share, 4) for c in layers]}


def permanent_rows(neuron_index: np.ndarray, cut: LayerCut) -> np.ndarray:
    """The parent neurons that run whatever expert is chosen: shared, or in every routed expert."""
    return np.union1d(neuron_index[: cut.shared_width], permanent_channels(routed_neurons(neuron_index, cut)))


def permanent_channels(routed_RM: np.ndarray) -> np.ndarray:
    """The channels that every expert holds, ascending."""
    channels, counts = np.unique(routed_RM, return_counts=True)
    return channels[counts == len(routed_RM)]


def rows_are_tied(mlp: RoutedMLP) -> bool:
    """Whether rows of one layer that hold the same parent neuron have equal weights, bit for bit."""
    slots, first_U = distinct_neurons(mlp.neuron_index.long())
    gate_up, down = mlp.dense_weights()
    return all(torch.equal(rows, rows[first_U[slots]]) for rows in (*gate_up.chunk(2), down.T))


def distinct_neurons(neurons: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which distinct neuron each row holds, in the shape of `neurons`, and the first row (flat) of each of them [U]."""
    distinct_U, slots = neurons.unique(return_inverse=True)
    first_U = torch.full_like(distinct_U, slots.numel())
    return slots, first_U.scatter_reduce_(0, slots.flatten(), torch.arange(slots.numel()).to(slots), "amin")
