"""`LocalUnits`: the units of a host in the engine's own process, for whole layers (`LocalExchange`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pregate.kernels.contract import ExpertFFN
from pregate.kernels.units import LayerUnits, SharedFFN
from pregate.kernels.weights import split_shared
from pregate.model.config import LayerCut
from pregate.workers.link.protocol import Expected

if TYPE_CHECKING:
    from pregate.workers.host.store import UnitStore


class LocalUnits:
    """What a host holds and computes with, shared with one engine. `count` is called with layers, rows of each and
    pairs. `looks_ahead` says that units come before they are asked for."""

    def __init__(
        self,
        ffn: ExpertFFN,
        store: UnitStore,
        cuts: Sequence[LayerCut],
        count: Callable[[int, int, int], None],
        looks_ahead: bool = False,
    ) -> None:
        self.ffn, self.count, self.looks_ahead = ffn, count, looks_ahead
        self._store, self._cuts = store, cuts
        self._units: dict[int, tuple[int, LayerUnits]] = {}

    @property
    def complete(self) -> bool:
        """True while every unit of the checkpoint is held."""
        return self._store.complete

    def hold_shared(self, layer: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Hold a layer's shared expert, stored as one FFN `gate_up` [2 S M, D] and `down` [D, S M], as S units."""
        self._store.hold_shared(layer, split_shared(gate_up, down, self._cuts[layer].num_shared))

    def plan(self, engine: str, step: int, used_LR: np.ndarray) -> None:
        """Take in which units bool [L, R] the next step uses."""
        if self.looks_ahead:
            self._store.plan(engine, step, used_LR)

    def expect(self, engine: str, expected: Expected) -> None:
        """Take in what an engine expects of later steps."""
        if self.looks_ahead:
            self._store.expect(engine, expected)

    def read(self, engine: str, step: int, layer: int, expert_ids: np.ndarray) -> None:
        """Return when these experts (ascending ids) are all in slots, reading those that are not. They stay until
        `release`."""
        if self.looks_ahead:
            self._store.reach(engine, step, layer)
        self._store.lookup(layer, expert_ids)

    def release(self) -> None:
        """What was read last is not in use any more."""
        self._store.release()

    def units(self, layer: int, shared: SharedFFN | None) -> LayerUnits:
        """Return a layer's units as they lie now; `shared` runs its shared expert where that is not among them."""
        version = int(self._store.versions[layer])
        found = self._units.get(layer)
        if found is None or found[0] != version:
            self._units[layer] = found = (
                version,
                LayerUnits(self._store.weights(layer), self._store.unit_slots(layer), shared),
            )
        return found[1]
