"""Rows of the real model's table: kept where they were made, taken from the committed table, never made twice."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.cuts import cut_of
from benchmarks.smollm2 import SmolLM2
from benchmarks.smollm2_report import write_report
from benchmarks.surroundings import surroundings

CUT = cut_of("S3A3E8")


def a_bench(folder: Path) -> SmolLM2:
    return SmolLM2(Namespace(work=folder / "work", out=folder / "out", shared_folder=folder, tokens=100))


def a_row(perplexity: float) -> dict[str, Any]:
    dense = {"perplexity": 10.0, "active_share": 1.0, "ratio_to_dense": 1.0}
    own = {"perplexity": perplexity, "active_share": 0.75, "ratio_to_dense": perplexity / 10}
    return own | {"routing": "path", "controls": {"dense parent": dense, "path router": own}}


def never() -> dict[str, Any]:
    raise AssertionError("a row that was there is made again")


def test_rows_outlast_the_folder_they_were_made_in(tmp_path: Path) -> None:
    first = a_bench(tmp_path)
    first.row(CUT, "path", 0, "GSM8K", lambda: a_row(12.0))
    write_report(list(first.rows().values()), surroundings("smollm2"), tmp_path / "out")
    (tmp_path / "work").rename(tmp_path / "lost")
    second = a_bench(tmp_path)
    second.row(CUT, "path", 0, "GSM8K", never)
    second.row(CUT, "path", 1, "GSM8K", lambda: a_row(14.0))
    write_report(list(second.rows().values()), surroundings("smollm2"), tmp_path / "out")
    table = (tmp_path / "out" / "smollm2.md").read_text()
    assert "| S3A3E8 | 10.00 |  |  |  |  | 13.00 (1.300; 0.750; 2 seeds, 12.00 to 14.00) |" in table
    assert f"Rows: 2 on {second.rows()['S3A3E8-path-0-GSM8K-100']['made']['cpu']} (" in table


def test_a_row_made_anew_replaces_the_committed_one(tmp_path: Path) -> None:
    bench = a_bench(tmp_path)
    bench.row(CUT, "path", 0, "GSM8K", lambda: a_row(12.0))
    write_report(list(bench.rows().values()), surroundings("smollm2"), tmp_path / "out")
    file = tmp_path / "work" / "rows" / "S3A3E8-path-0-GSM8K-100.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"perplexity": 11.0}))
    assert bench.rows()[file.stem]["perplexity"] == 11.0
    assert not bench.lacks(CUT, "path", 0, ["GSM8K"]) and bench.lacks(CUT, "path", 0, ["GSM8K", "WikiText-2"])
