"""Whatever may take over 5 s on a large model says that it is at work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.export.options import ExportOptions
from pregate.convert.export.run import export
from pregate.convert.measure.evaluate import evaluate
from pregate.convert.measure.options import EvaluateOptions
from pregate.convert.progress import Progress
from pregate.convert.report.options import ReportOptions
from pregate.convert.report.run import report


class Named(Progress):
    """Keeps the names of what was said to be done, in order, and holds each stage to its total."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator:
        done: list[int] = []
        self.names.append(name)
        yield done.append
        assert sum(done) == total, name

    @contextmanager
    def doing(self, name: str) -> Iterator:
        self.names.append(name)
        yield


def test_evaluate(tiny_layerwise_checkpoint: Path, tiny_dense: Path, tiny_text: Path):
    """Reading text, hashing and loading had no word."""
    progress = Named()
    evaluate(EvaluateOptions(tiny_layerwise_checkpoint, (tiny_text,), 500, controls=True, parent=tiny_dense), progress)
    loading = ["checking files (bytes)", f"loading {tiny_layerwise_checkpoint.name}"]
    loading += ["looking for the parent", f"loading {tiny_dense.name}"]
    assert progress.names[:6] == ["reading text", *loading, "scoring"]
    assert all(name.startswith("scoring ") for name in progress.names[6:])


@pytest.mark.parametrize("compared", [0, 1])
def test_report(tiny_path_checkpoint: Path, tiny_dense: Path, tiny_text: Path, tmp_path: Path, compared: int):
    """Runs had numbers without a total, most of them no name."""
    progress, others = Named(), (tiny_dense,) * compared
    options: dict[str, Any] = {"compare": others, "parent": tiny_dense, "max_tokens": 200}
    report(ReportOptions(tiny_path_checkpoint, tmp_path / "page.html", (tiny_text,), **options), progress)
    runs = [name for name in progress.names if name.startswith("run ")]
    heads, named = zip(*(name.split(": ") for name in runs), strict=True)
    assert heads == tuple(f"run {n} of {len(runs)}" for n in range(1, len(runs) + 1))
    assert named[0] == "dense parent" and len(set(named)) == len(named)
    assert "oracle, 0 active" in named and "who visits what" in named
    assert not [name for name in progress.names if name.startswith("scoring")]


def test_export(stock_checkpoint: Path, tiny_text: Path, tmp_path: Path):
    """Texts were compared, and layers checked, without a word."""
    before, progress = Named(), Named()
    export(ExportOptions(stock_checkpoint, tmp_path / "dense", "dense"), before)
    assert before.names == [
        "checking files (bytes)", "checking layers", "writing layers", "comparing with the parent"
    ]  # fmt: skip
    export(ExportOptions(stock_checkpoint, tmp_path / "stock", "qwen2_moe", text=(tiny_text,)), progress)
    assert progress.names == [
        "checking files (bytes)", "checking layers", "reading text", "checking files (bytes)",
        f"loading {stock_checkpoint.name}", "measuring gates", "writing layers", "loading the export",
        "comparing logits", "comparing texts",
    ]  # fmt: skip


def test_convert(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    """A whole layer was one step."""
    progress = Named()
    convert(
        ConvertOptions(tiny_dense, tmp_path / "out", 8, 2, 2, (tiny_text,), samples=8, sequence_length=32), progress
    )
    layers = [name for name in progress.names if name.startswith("layer ")]
    others = [name for name in progress.names if not name.startswith("layer ")]
    assert others == [
        "reading text", "hashing the model", "embedding windows", "cutting layers", "measuring (windows)",
        "writing the checkpoint",
    ]  # fmt: skip
    parts = ["dense windows", "cutting", "FFN inputs", "calibration windows", "routed windows"]
    assert layers == [f"layer {n}, {part}" for n in range(3) for part in parts]
