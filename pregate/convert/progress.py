"""What a long run tells the caller: stages with a total and steps done. Quiet unless given a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Where long runs report to."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Open a stage of `total` steps; the function it gives is called with the steps done since the last call."""
        ...

    def note(self, sentence: str) -> None:
        """Tell something once, e.g. that an interrupted run goes on."""
        ...


class QuietProgress:
    """Reports nothing; the default of every library call."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        yield lambda _steps: None

    def note(self, sentence: str) -> None:
        pass


class RichProgress:
    """A bar per stage on stderr, with the time left."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(name, total=total)
            yield lambda steps: bars.advance(task, steps)

    def note(self, sentence: str) -> None:
        sys.stderr.write(f"{sentence}\n")
