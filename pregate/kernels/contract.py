"""What every implementation of the expert FFN offers, whatever it runs on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pregate.kernels.units import GroupRows, LayerUnits
from pregate.kernels.weights import Layout

Pair = tuple[torch.Tensor, torch.Tensor]


class LayerSegments(Protocol):
    """What an implementation makes of all layers' choices; a layer's part is for its own `layer` alone."""

    def layer(self, layer: int) -> Any:
        """Return one layer's part."""
        ...


class ExpertFFN(ABC):
    """Runs experts. Shape letters: T tokens, N rows, P (row, unit) pairs, S slots, D hidden width, M expert width.

    `shared_in_segments`: whether `layer` wants segments that hold the shared units too. `compiles`: whether
    kernels are compiled when first called (`warm_up.py`). `why_no_layers`: why serving must not have `layer` in place
    of `dense`, `pairs` and a sum in fixed order; empty where it may.
    """

    name: str
    layout: Layout
    shared_in_segments = False
    compiles = False
    why_no_layers = ""

    @abstractmethod
    def block_m(self, num_rows: int, num_units: int) -> int:
        """Return the rows per tile that segments should be built with, for rows over units of a layer (means)."""

    def stack(self, gate_up_SMD: torch.Tensor, down_SDM: torch.Tensor) -> Any:
        """Return experts `gate_up_SMD` [S, 2M, D] (gate rows first) and `down_SDM` [S, D, M] in this layout."""
        return self.layout.stack(gate_up_SMD, down_SDM)

    @abstractmethod
    def units(
        self, shared: Pair | None, num_shared: int, gate_up_RMD: torch.Tensor, down_RDM: torch.Tensor
    ) -> LayerUnits:
        """Return a whole layer for `layer`: its shared expert (one FFN, `num_shared` units wide) and routed ones."""

    @abstractmethod
    def segments(
        self, ids_TLK: torch.Tensor, num_routed: int, num_shared: int, weights_TLK: torch.Tensor | None = None
    ) -> LayerSegments:
        """Return what `layer` reads, for all these layers at once, on the device; ids of any integer type, -1 for none.

        Nothing waits for the device where `ids_TLK` is on the host or already there. ValueError for ids on the host
        that are out of range.
        """

    @abstractmethod
    def prepare(self, groups: Sequence[GroupRows]) -> list[GroupRows]:
        """Return groups with all that `pairs` makes of the indexes, made for all at once (one copy to a device).

        PregateError for a unit without a slot. A group need not be prepared; `pairs` then does it.
        """

    @abstractmethod
    def pairs(self, x_ND: torch.Tensor, rows: GroupRows, weights: Any) -> torch.Tensor:
        """Return [P, D], one row per pair in order: what a host answers. PregateError for a unit without a slot."""

    @abstractmethod
    def dense(self, x_TD: torch.Tensor, weights: Any) -> torch.Tensor:
        """Return [T, D]: every row through the expert in slot 0 (a shared expert in a stack of its own)."""

    @abstractmethod
    def layer(self, x_TD: torch.Tensor, segment: Any, units: LayerUnits) -> torch.Tensor:
        """Return [T, D], the sum over each token's units. PregateError for a unit without a slot."""
