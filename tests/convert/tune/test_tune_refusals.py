"""What `tune` refuses, and what is refused of a checkpoint that it made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pregate.base.errors import UserError
from pregate.convert.export.dense import check_dense
from pregate.convert.files.routed_shards import RoutedShards
from pregate.convert.tune.options import TuneOptions
from pregate.convert.tune.run import tune
from pregate.model.folder import read_folder
from tests.convert.tune.tuning import tiny_options


@pytest.fixture
def options(tiny_path_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> TuneOptions:
    return tiny_options(tiny_path_checkpoint, tiny_text, tmp_path / "out")


def test_a_tuned_checkpoint_needs_a_teacher(options: TuneOptions, tiny_dense: Path, tmp_path: Path):
    tune(options)
    again = replace(options, model=options.out, out=tmp_path / "again", steps=2)
    with pytest.raises(UserError, match=r"model \S+out: is tuned already.*give teacher \S+, or kl_share 0"):
        tune(again)
    assert not again.out.exists()
    assert tune(replace(again, teacher=tiny_dense)).method == "cmoe+decouple+tune+tune"
    assert tune(replace(again, kl_share=0.0, out=tmp_path / "plain")).figures["tune"]["steps"] == 2


def test_the_neurons_of_a_tuned_checkpoint_are_not_given_back_as_the_parents(options: TuneOptions):
    tune(options)
    with pytest.raises(UserError, match=r"format dense: .*was tuned \(cmoe\+decouple\+tune\)"):
        check_dense(RoutedShards(read_folder(options.out)))
    check_dense(RoutedShards(read_folder(options.model)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": "prefix"}, "method prefix: allowed: full, lora"),
        ({"balance": "even"}, "balance even: allowed: none, bias, loss"),
        ({"rank": 0}, "rank 0: allowed: 1 or more"),
        ({"alpha": 0.0}, r"alpha 0\.0: allowed: above 0"),
        ({"learning_rate": float("nan")}, "learning_rate nan: allowed: above 0"),
        ({"kl_share": 1.5}, r"kl_share 1\.5: allowed: 0 to 1"),
        ({"steps": 0}, "steps 0: allowed: 1 or more"),
        ({"minutes": 0.0}, r"minutes 0\.0: allowed: above 0"),
        ({"validation_share": 1.0}, r"validation_share 1\.0: allowed: between 0 and 1"),
        ({"text": ()}, "text: 0 given; allowed: 1 or more"),
        ({"text": (Path("/nowhere"),)}, "text /nowhere: no such path"),
        ({"model": Path("/nowhere")}, "model /nowhere: no such path"),
        ({"teacher": Path("/nowhere")}, "teacher /nowhere: no such path"),
        ({"device": "tpu"}, "device tpu: allowed"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(options: TuneOptions, change: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        tune(replace(options, **change))
    assert list(options.out.parent.iterdir()) == []


def test_a_teacher_without_weights_is_named_as_the_teacher(options: TuneOptions, tiny_dense: Path, tmp_path: Path):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_bytes((tiny_dense / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"^teacher .*hollow: its weights cannot be loaded"):
        tune(replace(options, teacher=tmp_path / "hollow"))


def test_teachers_that_cannot_be_one(
    options: TuneOptions, tiny_path_checkpoint: Path, tiny_dense: Path, tmp_path: Path
):
    small = tmp_path / "small"
    small.mkdir()
    fields = json.loads((tiny_dense / "config.json").read_text()) | {"vocab_size": 500}
    (small / "config.json").write_text(json.dumps(fields))
    for teacher, reason in (
        (tiny_path_checkpoint, "is a routed checkpoint"),
        (small, "has a vocabulary of 500, .* 512"),
    ):
        with pytest.raises(UserError, match=f"teacher .*{reason}"):
            tune(replace(options, teacher=teacher))
    (small / "config.json").write_text(json.dumps(fields | {"vocab_size": 512, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"teacher .*differs in layers or width; allowed: hidden_match 0"):
        tune(replace(options, teacher=small, hidden_match=1.0))
    with pytest.raises(UserError, match=r"teacher .*has no use with kl_share 0 and hidden_match 0"):
        replace(options, teacher=tiny_dense, kl_share=0.0)
