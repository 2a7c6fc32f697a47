"""`UnitSource`: where a host's units come from: its budget of host memory, else the checkpoint's files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from pregate.base.errors import CheckpointError
from pregate.base.log import get_logger
from pregate.workers.host.slots import Unit as Weights

Unit = tuple[int, int]
#: How often a unit is read before its failure is one.
ATTEMPTS = 2

_log = get_logger(__name__)


class Reader(Protocol):
    """What reads units of a checkpoint (`model.checkpoint.CheckpointReader`)."""

    def read_unit(self, layer: int, expert: int, out: Weights | None = None) -> Weights: ...

    def read_ahead(self, layer: int, expert: int) -> None: ...


class UnitSource:
    """Reads units, of which up to `memory_bytes` stay in host memory as the checkpoint has them (`pinned`: where a
    device can copy from by itself). Two threads may read at a time."""

    def __init__(self, reader: Reader, memory_bytes: int = 0, pinned: bool = False) -> None:
        self._reader, self._memory_bytes, self._pinned = reader, memory_bytes, pinned
        self._lock = threading.Lock()
        self._held: dict[Unit, Weights] = {}
        self._ahead: set[Unit] = set()
        self.held_bytes = 0

    def read(self, unit: Unit, farthest: Callable[[Iterable[Unit]], Unit], out: Weights | None = None) -> Weights:
        """Return a unit: `out` where it can be read into that, and is not kept in memory. `farthest` says which of
        those in memory should go first, this one among them.

        A read that fails is tried once more; then its CheckpointError is raised, or UserError for no such unit.
        """
        with self._lock:
            self._ahead.discard(unit)
            if unit in self._held:
                return self._held[unit]
        if out is not None and out[0].nbytes + out[1].nbytes <= self._memory_bytes:
            out = None
        weights = self._read(unit, out)
        num_bytes = weights[0].nbytes + weights[1].nbytes
        if num_bytes <= self._memory_bytes:
            if self._pinned:
                weights = weights[0].pin_memory(), weights[1].pin_memory()
            with self._lock:
                self._keep(unit, weights, farthest)
        return weights

    def read_ahead(self, units: Iterable[Unit]) -> None:
        """Have the files' parts of these units brought into memory by the system, which goes on by itself."""
        for unit in units:
            if unit not in self._held and unit not in self._ahead:
                self._ahead.add(unit)
                self._reader.read_ahead(*unit)

    def _read(self, unit: Unit, out: Weights | None) -> Weights:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._reader.read_unit(*unit, out)
            except (CheckpointError, OSError) as error:
                if attempt == ATTEMPTS:
                    raise CheckpointError(f"unit {unit} cannot be loaded: {error}") from error
                _log.warning("unit %s could not be read, trying again: %s", unit, error)
        raise AssertionError

    def _keep(self, unit: Unit, weights: Weights, farthest: Callable[[Iterable[Unit]], Unit]) -> None:
        self._held[unit] = weights
        self.held_bytes += weights[0].nbytes + weights[1].nbytes
        while self.held_bytes > self._memory_bytes:
            gone = self._held.pop(farthest(self._held))
            self.held_bytes -= gone[0].nbytes + gone[1].nbytes
