"""What a long run tells the caller: stages with a total and steps done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

Advance = Callable[[int], None]

#: Steps of the last so many seconds tell the speed: where each takes a minute, those of rich's 30 are none.
SPEED_PERIOD_S = 1800.0
#: Seconds between lines where stderr is no terminal.
LINE_EVERY_S = 60.0


class Progress:
    """Where long runs report to; this one tells nothing."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Open a stage of `total` steps; the function it gives is called with the steps done since the last call."""
        yield lambda _steps: None

    def note(self, sentence: str) -> None:
        """Tell something once, e.g. that an interrupted run goes on."""


#: The default of every library call.
QUIET = Progress()


class RichProgress(Progress):
    """A bar per stage on stderr, with the time left; where stderr is no terminal, a line a minute and one at the end.

    A stage within another is a second bar beneath, or lines where it lasts over a minute. `clock` gives seconds. (A
    test has its own.)
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bars: Bars | None = None

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        if self._bars is not None:
            with self._within(self._bars, name, total) as lines:
                yield lines.advance
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        shown = {"console": console, "disable": not console.is_terminal}
        with Bars(*columns, **shown, speed_estimate_period=SPEED_PERIOD_S, get_time=self._clock) as bars:
            self._bars = bars
            try:
                with self._within(bars, name, total) as lines:
                    yield lines.advance
                    lines.at_end()
            finally:
                self._bars = None

    @contextmanager
    def _within(self, bars: Bars, name: str, total: int) -> Iterator[_Lines]:
        lines = _Lines(bars, bars.add_task(name, total=total), self._clock, self.note)
        yield lines
        if len(bars.tasks) > 1:
            bars.remove_task(lines.task_id)

    def note(self, sentence: str) -> None:
        sys.stderr.write(f"{sentence}\n")
        sys.stderr.flush()


class _Lines:
    """Advances one of rich's `bars`; where they are not shown, tells how far it is at most once in `LINE_EVERY_S`."""

    def __init__(self, bars: Bars, task_id: TaskID, clock: Callable[[], float], tell: Callable[[str], None]) -> None:
        self.task_id, self._bars, self._task, self._clock, self._tell = task_id, bars, bars.tasks[-1], clock, tell
        self._told_s = clock()

    def advance(self, steps: int) -> None:
        self._bars.advance(self.task_id, steps)
        if not self._bars.disable or self._task.finished or self._clock() - self._told_s < LINE_EVERY_S:
            return
        self._told_s = self._clock()
        left = self._task.time_remaining
        when = "" if left is None else f", {_hours(left)} left"
        self._tell(f"{self._so_far()} ({int(self._task.percentage)} %){when}")

    def at_end(self) -> None:
        if self._bars.disable:
            self._tell(f"{self._so_far()}, {_hours(self._task.elapsed or 0)}")

    def _so_far(self) -> str:
        return f"{self._task.description}: {self._task.completed:,.0f} of {self._task.total:,.0f}"


def _hours(seconds: float) -> str:
    """E.g. 0:05:10."""
    return str(timedelta(seconds=round(seconds)))
