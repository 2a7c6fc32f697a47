"""Slow steps have a time left, on a terminal and off it."""

from __future__ import annotations

import io
import re
import time

import pytest

from pregate.convert.progress import RichProgress


class Clock:
    """Seconds, as a test sets them."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(clock: Clock, total: int, steps: int, step_s: float, first: int = 0) -> None:
    """`steps` steps of a stage of `total`, of which `first` were done in an earlier run."""
    with RichProgress(clock).stage("tuning (steps)", total) as advance:
        advance(first)
        for _ in range(steps):
            clock.now_s += step_s
            advance(1)


def test_steps_of_31_seconds_have_a_line_a_minute(clock: Clock, capsys: pytest.CaptureFixture):
    run(clock, 6, 6, 31)
    assert capsys.readouterr().err.splitlines() == [
        "tuning (steps): 2 of 6 (33 %), 0:02:04 left",
        "tuning (steps): 4 of 6 (66 %), 0:01:02 left",
        "tuning (steps): 6 of 6, 0:03:06",
    ]


def test_what_an_earlier_run_did_is_not_counted_as_speed(clock: Clock, capsys: pytest.CaptureFixture):
    run(clock, 1010, 2, 600, first=1000)
    assert capsys.readouterr().err.splitlines() == [
        "tuning (steps): 1,001 of 1,010 (99 %), 1:30:00 left",
        "tuning (steps): 1,002 of 1,010 (99 %), 1:20:00 left",
        "tuning (steps): 1,002 of 1,010, 0:20:00",
    ]


def test_quick_steps_have_one_line_at_the_end(clock: Clock, capsys: pytest.CaptureFixture):
    run(clock, 50, 50, 1.1)
    assert capsys.readouterr().err == "tuning (steps): 50 of 50, 0:00:55\n"


def test_a_terminal_has_a_bar_with_the_time_left(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run(clock, 6, 2, 31)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"2/6 0:01:02 left 0:02:04", plain)
    assert "of 6" not in plain


def test_a_long_stage_within_another_has_its_lines_and_a_quick_one_none(clock: Clock, capsys: pytest.CaptureFixture):
    progress = RichProgress(clock)
    with progress.stage("tuning (steps)", 2) as advance:
        advance(1)
        for step_s in (1, 40):
            with progress.stage("validating (rows)", 3) as validated:
                for _ in range(3):
                    clock.now_s += step_s
                    validated(1)
        advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "validating (rows): 2 of 3 (66 %), 0:00:40 left",
        "tuning (steps): 2 of 2, 0:02:03",
    ]


def test_a_terminal_has_a_bar_within_another(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    progress = RichProgress(clock)
    with progress.stage("tuning (steps)", 6) as advance:
        with progress.stage("validating (rows)", 3) as validated:
            validated(2)
            time.sleep(0.3)  # rich draws ten times a second
        advance(1)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"validating \(rows\) .* 2/3", plain)
    assert re.search(r"tuning \(steps\) .* 1/6", plain.splitlines()[-1])


def test_a_name_in_brackets_is_no_markup(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with RichProgress(clock).stage("profiling [/x]", 2) as advance:
        advance(2)
    assert "profiling [/x]" in terminal.getvalue()
