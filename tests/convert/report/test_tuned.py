"""`pregate report` on tuned checkpoints, which with every expert on are their dense parents no more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pregate.cluster.cli import main
from pregate.convert.control_table import DENSE
from pregate.convert.evaluate import EvaluateOptions, evaluate
from pregate.convert.report.run import ReportOptions, report
from pregate.convert.tune import tune
from tests.convert.tuning import tiny_options


@pytest.fixture(scope="module")
def tuned(tiny_path_checkpoint: Path, tiny_dense: Path, tiny_text: Path, tmp_path_factory) -> Path:
    """Tuned, in a folder with its parent, which the manifest names by a path that holds nowhere."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(tiny_dense, folder / "dense")
    tune(tiny_options(tiny_path_checkpoint, tiny_text, folder / "tuned", steps=6))
    manifest = json.loads((folder / "tuned" / "manifest.json").read_text())
    manifest["source"]["path"] = "made/dense"
    (folder / "tuned" / "manifest.json").write_text(json.dumps(manifest))
    return folder / "tuned"


def test_it_goes_by_the_parent_beside_it(tuned: Path, tiny_text: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = report(ReportOptions(tuned, tmp_path / "r.html", (tiny_text,), max_tokens=60))
    assert figures.conditions.dense == str(tuned.parent / "dense")
    dense = evaluate(EvaluateOptions(tuned.parent / "dense", tiny_text, 60))["perplexity"]
    assert figures.quality.point(DENSE).perplexity == dense
    (oracle,) = [curve for curve in figures.quality.curves if curve.name == "oracle"]
    assert oracle.perplexities[-1] != pytest.approx(dense, rel=1e-3)  # so it matters which of the two is called dense


def test_without_its_parent_it_is_refused(tuned: Path, tiny_text: Path, tmp_path: Path, capsys):
    shutil.copytree(tuned, tmp_path / "alone")
    words = ["--model", str(tmp_path / "alone"), "--text", str(tiny_text), "--max-tokens", "60"]
    assert main(["report", *words, "--out", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err
    assert "was tuned, so with every expert on it is its dense parent no more" in error
    assert "give the dense model with --parent" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r.html").exists()
    given = ["--parent", str(tuned.parent / "dense")]
    assert main(["report", *words, "--out", str(tmp_path / "r.html"), *given]) == 0
