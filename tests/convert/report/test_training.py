from __future__ import annotations

import json
from pathlib import Path

import pytest

from pregate.base.errors import UserError
from pregate.convert.report.training import MAX_POINTS, training_curves


def _write(folder: Path, records: list) -> None:
    (folder / "training.jsonl").write_text("\n".join(json.dumps(r) for r in records) + "\n\n")


def test_curves_are_read_by_name(tmp_path: Path):
    assert training_curves(tmp_path) == ()
    _write(tmp_path, [{"step": 1, "loss": 3, "odd": 5}, {"step": 2, "loss": 2.5, "validation_perplexity": 9}, [1]])
    loss, validation = training_curves(tmp_path)
    assert (loss.name, loss.steps, loss.values) == ("loss", (1, 2), (3, 2.5))
    assert (validation.name, validation.steps, validation.values) == ("validation_perplexity", (2,), (9,))


def test_what_is_no_number_is_left_out(tmp_path: Path):
    _write(tmp_path, [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": "x"}, {"loss": 1}, {"step": 3, "loss": 4}])
    (loss,) = training_curves(tmp_path)
    assert (loss.steps, loss.values) == ((3,), (4,))


def test_long_curves_are_means_of_stretches(tmp_path: Path):
    _write(tmp_path, [{"step": i, "loss": i} for i in range(2 * MAX_POINTS)])
    (loss,) = training_curves(tmp_path)
    assert len(loss.values) == MAX_POINTS
    assert loss.values[:2] == (0.5, 2.5)


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / "training.jsonl").write_text('{"step": 1}\n{"step"')
    with pytest.raises(UserError, match=r"training.jsonl:2: not a JSON record"):
        training_curves(tmp_path)
