"""Runs that are interrupted in this process, after a number of layers or steps."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.progress import Progress

#: Stages that measure between steps.
BETWEEN = ("validating", "setting thresholds", "layer ", "measuring", "checking files")


class StopsAfter(Progress):
    """Raises Ctrl-C once `number` layers or steps are done (never: -1); keeps notes, and how far stages came."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.steps: list[int] = []
        self.notes: list[str] = []
        self.stages: list[tuple[str, int, int]] = []

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator:
        done: list[int] = []
        yield done.append if name.startswith(BETWEEN) else lambda steps: (done.append(steps), self._advance(steps))
        self.stages.append((name, sum(done), total))

    def _advance(self, steps: int) -> None:
        self.steps.append(steps)
        self._left -= steps
        if self._left == 0:
            raise KeyboardInterrupt

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


def interrupt(options: ConvertOptions, num_layers: int) -> None:
    """Convert until `num_layers` are done, those of an earlier run counted."""
    with pytest.raises(KeyboardInterrupt):
        convert(options, StopsAfter(num_layers))
    assert not options.out.exists()


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """As on a disk that is full: what goes beyond fails (with EFBIG for ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
