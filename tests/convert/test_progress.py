"""Slow steps have a time left, on a terminal and off it."""

from __future__ import annotations

import io
import re
import threading
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


def reported(clock: Clock) -> RichProgress:
    """Looks at its clock at every step, and by itself so rarely that no test lasts as long."""
    return RichProgress(clock, tick_s=3600)


def run(clock: Clock, total: int, steps: int, step_s: float, first: int = 0) -> None:
    """`steps` steps of a stage of `total`, of which `first` were done in an earlier run."""
    with reported(clock).stage("tuning (steps)", total) as advance:
        advance(first)
        for _ in range(steps):
            clock.now_s += step_s
            advance(1)


def test_off_a_terminal_every_long_step_has_a_line(clock: Clock, capsys: pytest.CaptureFixture):
    run(clock, 4, 4, 31)
    assert capsys.readouterr().err.splitlines() == [
        "tuning (steps): 1 of 4 (25 %) in 0:00:31, 0:01:33 left",
        "tuning (steps): 2 of 4 (50 %) in 0:01:02, 0:01:02 left",
        "tuning (steps): 3 of 4 (75 %) in 0:01:33, 0:00:31 left",
        "tuning (steps): 4 of 4, 0:02:04",
    ]


def test_what_an_earlier_run_did_is_not_counted_as_speed(clock: Clock, capsys: pytest.CaptureFixture):
    run(clock, 1010, 2, 600, first=1000)
    assert capsys.readouterr().err.splitlines() == [
        "tuning (steps): 1,001 of 1,010 (99 %) in 0:10:00, 1:30:00 left",
        "tuning (steps): 1,002 of 1,010 (99 %) in 0:20:00, 1:20:00 left",
        "tuning (steps): 1,002 of 1,010, 0:20:00",
    ]


def test_a_stage_is_named_after_a_second_and_then_about_every_5(clock: Clock, capsys: pytest.CaptureFixture):
    """It used to be a line a minute, and none for 55 seconds."""
    run(clock, 50, 50, 1.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tuning (steps): 1 of 50 (2 %) in 0:00:01, 0:00:54 left"
    assert [int(line.split()[2]) for line in lines] == [1, 6, 11, 16, 21, 26, 31, 36, 41, 46, 50]


def test_what_takes_less_than_a_second_has_no_line_unless_much_of_it_has_passed(
    clock: Clock, capsys: pytest.CaptureFixture
):
    progress = reported(clock)
    for number in range(9):
        with progress.stage(f"stage {number}", 1) as advance:
            clock.now_s += 0.9
            advance(1)
    assert capsys.readouterr().err.splitlines() == ["stage 5: 1 of 1, 0:00:01"]


def test_lines_come_while_no_step_is_done_and_where_none_are_counted(clock: Clock):
    """A layer of a large model, the loading of one, a text: what lasts says so by itself."""
    lines, said = [], threading.Event()

    class Heard(RichProgress):
        def note(self, sentence: str) -> None:
            lines.append(sentence)
            said.set()

    progress = Heard(clock, tick_s=0.01)

    def wait(seconds: float) -> None:
        said.clear()
        clock.now_s += seconds
        assert said.wait(20)

    with progress.stage("cutting layers", 2):
        wait(1)
        wait(5)
        with progress.doing("layer 0, cutting"):
            wait(5)
    with progress.doing("loading big"):
        wait(1)
    assert lines == [
        "cutting layers: 0 of 2 (0 %) in 0:00:01",
        "cutting layers: 0 of 2 (0 %) in 0:00:06",
        "layer 0, cutting: 0:00:05 so far",
        "cutting layers: 0 of 2, 0:00:11",
        "loading big: 0:00:01 so far",
        "loading big: 0:00:01",
    ]
    assert not any(thread.name == "pregate-progress" for thread in threading.enumerate())


def test_a_terminal_has_a_bar_with_the_time_left(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run(clock, 6, 2, 31)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"2/6 0:01:02 left 0:02:04", plain)
    assert "of 6" not in plain


def test_lines_are_of_the_innermost_stage(clock: Clock, capsys: pytest.CaptureFixture):
    progress = reported(clock)
    with progress.stage("tuning (steps)", 2) as advance:
        advance(1)
        for step_s in (1, 40):
            with progress.stage("validating (rows)", 3) as validated:
                for _ in range(3):
                    clock.now_s += step_s
                    validated(1)
        advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "validating (rows): 1 of 3 (33 %) in 0:00:01",
        "validating (rows): 1 of 3 (33 %) in 0:00:40",
        "validating (rows): 2 of 3 (66 %) in 0:01:20, 0:00:40 left",
        "tuning (steps): 2 of 2, 0:02:03",
    ]


def test_a_terminal_has_a_bar_within_another(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    progress = reported(clock)
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
    with reported(clock).stage("profiling [/x]", 2) as advance:
        advance(2)
    assert "profiling [/x]" in terminal.getvalue()
