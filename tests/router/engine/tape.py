"""A stand-in for `torch.cuda.CUDAGraph` where there is no device: what a step launches is written down with the very
tensors it was launched on, and replayed on them without a line of the step's Python.

As of a graph, whatever the step decides on the host, sizes as well as values it reads, stays as it was at the capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


class Tape(TorchDispatchMode):
    """Operations of torch and launches of kernels in their order. `pool` is there for the protocol."""

    def __init__(self) -> None:
        super().__init__()
        self._entries: list[Callable[[], None]] = []
        self.num_replays = 0

    @classmethod
    def capture(cls, step: Callable[[], torch.Tensor]) -> tuple[Tape, torch.Tensor]:
        """As `decode_graphs.capture`."""
        tape = cls()
        with tape:
            result = step()
        return tape, result

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        self.num_replays += 1
        for entry in self._entries:
            entry()

    def launch(self, kernel: Callable[[], None]) -> None:
        """Launch a kernel and write it down."""
        self._entries.append(kernel)
        with _disable_current_modes():
            kernel()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        made = [part for part in _tensors(results) if _memory(part) not in map(_memory, _tensors((args, kwargs)))]

        def again() -> None:
            fresh = _tensors(func(*args, **kwargs))
            for old, new in zip(_tensors(results), fresh, strict=True):
                if any(old is part for part in made):
                    old.copy_(new)

        if made or func._schema.is_mutable:  # else a view of what is there: it sees what is written
            self._entries.append(again)
        return results


def _memory(part: torch.Tensor) -> int:
    return part.untyped_storage().data_ptr() if part.layout == torch.strided else id(part)


def _tensors(parts: Any) -> list[torch.Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(parts, torch.Tensor):
        return [parts]
    if isinstance(parts, dict):
        parts = list(parts.values())
    return [one for part in parts for one in _tensors(part)] if isinstance(parts, (list, tuple)) else []
