"""What a long run tells the caller: stages with a total and steps done, and work whose steps nobody counts."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import Task

Advance = Callable[[int], None]

#: Steps of the last so many seconds tell the speed: where each takes a minute, those of rich's 30 are none.
SPEED_PERIOD_S = 1800.0
#: Where stderr is no terminal: a stage that lasts so long is named, and no more than so long passes without a line.
FIRST_LINE_S, LINE_EVERY_S = 1.0, 5.0
#: How often it is looked whether a line is due, besides at every step.
TICK_S = 0.5


class Progress:
    """Where long runs report to; this one tells nothing."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Open a stage of `total` steps; the function it gives is called with the steps done since the last call."""
        yield lambda _steps: None

    @contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """Say what the block does, which may take long and has no steps to count."""
        yield

    def note(self, sentence: str) -> None:
        """Tell something once, e.g. that an interrupted run goes on."""


#: The default of every library call.
QUIET = Progress()


class RichProgress(Progress):
    """A bar per stage on stderr, with the time left. Where stderr is no terminal: a line when a stage has lasted
    `FIRST_LINE_S`, one every `LINE_EVERY_S`, whether or not a step is done meanwhile, and one at its end.

    A stage within another is a second bar beneath; off a terminal the lines are of the innermost. `clock` gives
    seconds, and every `tick_s` of real time it is looked at. (A test has its own.)
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, tick_s: float = TICK_S) -> None:
        self._clock, self._tick_s = clock, tick_s
        self._bars: Bars | None = None
        self._lock = threading.Lock()
        self._line_s, self._is_named = clock(), False

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        with self._shown(name, total) as advance:
            yield advance

    @contextmanager
    def doing(self, name: str) -> Iterator[None]:
        with self._shown(name, None):
            yield

    def note(self, sentence: str) -> None:
        sys.stderr.write(f"{sentence}\n")
        sys.stderr.flush()

    @contextmanager
    def _shown(self, name: str, total: int | None) -> Iterator[Advance]:
        if self._bars is not None:
            bars, task_id = self._bars, self._bars.add_task(name, total=total)
            yield lambda steps: self._advance(bars, task_id, steps)
            bars.remove_task(task_id)
            return
        with self._begun() as bars:
            task_id = bars.add_task(name, total=total)
            task, self._is_named = bars.tasks[0], False
            with self._line_by_line(bars):
                yield lambda steps: self._advance(bars, task_id, steps)
            done = "" if total is None else f"{task.completed:,.0f} of {total:,}, "
            if bars.disable and (self._is_named or self._is_due(task)):
                self._write(f"{name}: {done}{_hours(task.elapsed or 0)}")
            if total is None:  # a bar that is full
                bars.update(task_id, total=1, completed=1)

    @contextmanager
    def _begun(self) -> Iterator[Bars]:
        """The bars, which are shown on a terminal and keep the time everywhere."""
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
                yield bars
            finally:
                self._bars = None

    @contextmanager
    def _line_by_line(self, bars: Bars) -> Iterator[None]:
        """Within the block lines come though no step is done; a terminal has its bars."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(self._tick_s):
                self._look(bars)

        watcher = threading.Thread(target=look, name="pregate-progress", daemon=True)
        if bars.disable:
            watcher.start()
        try:
            yield
        finally:
            over.set()
            if bars.disable:
                watcher.join()

    def _advance(self, bars: Bars, task_id: int, steps: int) -> None:
        bars.advance(task_id, steps)  # pyright: ignore[reportArgumentType] (its NewType of int)
        if bars.disable:
            self._look(bars)

    def _look(self, bars: Bars) -> None:
        """Tell how far the innermost stage is, where a line is due."""
        with self._lock:
            outer, *_, task = [*bars.tasks[:1], *bars.tasks]
            if not task.finished and self._is_due(outer):
                self._is_named = True
                self._write(_so_far(task))

    def _is_due(self, outer: Task) -> bool:
        lasted_s = outer.elapsed or 0
        return self._clock() - self._line_s >= LINE_EVERY_S or (not self._is_named and lasted_s >= FIRST_LINE_S)

    def _write(self, line: str) -> None:
        self._line_s = self._clock()
        self.note(line)


def _so_far(task: Task) -> str:
    lasted = _hours(task.elapsed or 0)
    if task.total is None:
        return f"{task.description}: {lasted} so far"
    left = "" if task.time_remaining is None else f", {_hours(task.time_remaining)} left"
    done = f"{task.completed:,.0f} of {task.total:,.0f} ({int(task.percentage)} %)"
    return f"{task.description}: {done} in {lasted}{left}"


def _hours(seconds: float) -> str:
    """E.g. 0:05:10."""
    return str(timedelta(seconds=round(seconds)))
