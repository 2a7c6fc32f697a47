"""The table of path routers on a tiny model: rows are made once, an interrupted one goes on, and it is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import router_ablation
from benchmarks.conversion import Subject, rows_in
from benchmarks.router_ablation import Ablation, Source, fill, folder_of, shortened
from benchmarks.router_ablation_report import write_report
from benchmarks.router_variants import REAL, STORIES
from pregate.convert.paths import training

ROWS = [[1, *range(9 + n, 40 + n)] for n in range(4)]
AROUND: dict[str, Any] = {
    "command": "c", "date": "d", "versions": {}, "hardware": {"cpu": "p", "cores": 2}, "torch_threads": 1,
    "load_average": 0.0,
}  # fmt: skip


@pytest.fixture
def ablation(tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> Ablation:
    tests = {name: Subject(name, tiny_layerwise_checkpoint, (), ROWS[n:], 100) for n, name in enumerate(("a", "b"))}
    source = Source("SmolLM2", lambda _name: tiny_layerwise_checkpoint, (tiny_text,), tests)
    (tmp_path / "S2A2E8").mkdir()
    return Ablation(source, "S2A2E8", tmp_path, {"steps": 12, "pool_tokens": 600})


def test_rows_are_made_once_and_written(ablation: Ablation, monkeypatch: pytest.MonkeyPatch):
    names = [REAL[0].label, "target: the oracle's sets"]
    made = list(fill([ablation], names))
    rows = rows_in(ablation.work, {"SmolLM2"}, range(9))
    assert (len(made), len(rows)) == (7, 2 + 3 + 3)  # a gap after both references, and one after each training
    trained = [row for row in rows if "fixed" in row]
    assert all({"a", "b"} == row["scores"].keys() == row["fixed"].keys() for row in trained)
    assert any(row["scores"]["a"]["active_share"] != row["fixed"]["a"]["active_share"] for row in trained)
    monkeypatch.setattr(router_ablation, "train_router", None)
    list(fill([ablation], names))
    facts = {"model": "SmolLM2", "steps": 12, "pool_tokens": 600}
    facts["texts"] = {name: test.facts for name, test in ablation.source.tests.items()}
    write_report(rows, facts, AROUND, ablation.work / "table")
    lines = (ablation.work / "table.md").read_text().splitlines()
    assert sum(line.startswith(("| reference |", "| default |", "| target |")) for line in lines) == 4
    assert len(json.loads((ablation.work / "table.json").read_text())["rows"]) == 8


def test_a_training_that_was_interrupted_goes_on(ablation: Ablation, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 5)
    whole = training._outputs
    runs: list[int] = []

    def stop_at_eight(*args: Any) -> Any:
        runs.append(1)
        if len(runs) == 8:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(training, "_outputs", stop_at_eight)
    with pytest.raises(KeyboardInterrupt):
        ablation.variant(REAL[0], 0)
    del ablation.pool  # a new process would have none
    ablation.variant(REAL[0], 0)
    assert len(runs) == 8 + 12 - 5
    assert rows_in(ablation.work, {"SmolLM2"}, range(9))[0]["of"] == REAL[0].label


def test_rows_of_other_lengths_are_kept_apart(ablation: Ablation, tmp_path: Path):
    assert folder_of(tmp_path, {}) == tmp_path / "defaults"
    assert folder_of(tmp_path, {"steps": 5, "pool_tokens": 9}) == tmp_path / "steps-5-pool-tokens-9"
    assert len({v.label for v in STORIES}) == len(STORIES)
    few = shortened(ablation.pool, replace(ablation.options, pool_tokens=300))
    assert 0 < sum(map(len, few.rows)) <= 300
    assert len(few.mass) == len(few.rows)
