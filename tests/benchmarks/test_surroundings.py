"""What is recorded of a run names no folder that only its machine has."""

from __future__ import annotations

import re

import pytest

from benchmarks.surroundings import ROOT, shown


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (ROOT / "runs" / "a", "runs/a"),
        (ROOT.parent / "shared", "../shared"),
        ("/nowhere/else/kernels.json", "kernels.json"),
        ("../shared", "../shared"),
        (ROOT.parent / "bench" / "cut75", "cut75"),
        ("../../elsewhere/models/cut75", "cut75"),
        ("examples/quartet", "examples/quartet"),
        ("--tokens", "--tokens"),
        (800000, "800000"),
    ],
)
def test_paths_are_said_by_where_they_lie_from_here(given: object, expected: str):
    assert shown(given) == expected


def test_recorded_results_name_no_folder_of_the_machine_they_were_measured_on():
    written = [p for p in (ROOT / "benchmarks" / "results").iterdir() if p.suffix in (".json", ".md", ".html")]
    written += (ROOT / "examples").glob("*/*.json")
    assert len(written) > 20
    named = re.compile(r"(?<![.\w])/(work|tmp|root|home|check)/|(?<![\w/])(\.\./)+(?!\.|shared\b)")
    assert [p.name for p in written if named.search(p.read_text(encoding="utf-8"))] == []
