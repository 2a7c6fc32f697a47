"""`pregate report` on tuned checkpoints, which with every expert on are their dense parents no more."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pregate.cli.main import main
from pregate.convert.measure.control_table import DENSE, ORACLE
from pregate.convert.measure.evaluate import EvaluateOptions, evaluate
from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.convert.report.figures import Figures
from pregate.convert.report.options import ReportOptions
from pregate.convert.report.page import render
from pregate.convert.report.run import report
from pregate.convert.report.training import tuning_of
from pregate.convert.tune.run import tune
from pregate.model.checkpoint import read_manifest
from tests.convert.report.pages import findings, text_of
from tests.convert.tune.tuning import tiny_options


@pytest.fixture(scope="module")
def reported(tuned: Path, tiny_text: Path, tmp_path_factory) -> tuple[Figures, str]:
    out = tmp_path_factory.mktemp("page") / "page.html"
    figures = report(ReportOptions(tuned, out, (tiny_text,), max_tokens=150))
    return figures, text_of(out.read_text())


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
    assert figures.conditions["dense"] == str(tuned.parent / "dense")
    dense = evaluate(EvaluateOptions(tuned.parent / "dense", (tiny_text,), 60))["perplexity"]
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


def _sentence(figures: Figures, subject: str) -> str:
    return findings(render(figures, "findings.html"))[subject][1]


def test_the_oracle_is_no_bound_of_what_was_tuned_to_its_router(reported: tuple[Figures, str]):
    figures, html = reported
    quality = figures.quality
    assert "which nothing can know beforehand: no bound, as the model was tuned to its router" in html
    beats = replace(quality.own_point, perplexity=quality.point(ORACLE).perplexity * 0.99)
    points = tuple(beats if p.name == quality.own else p for p in quality.controls)
    better = replace(figures, quality=replace(quality, controls=points))
    assert "(90 % or more); the model was tuned to this router, so it is no bound." in _sentence(better, "Router")
    assert "would gain little" not in _sentence(better, "Router")
    assert "to which the model was not tuned" in _sentence(better, "Known up front")
    untuned = replace(better, model=better.model | {"fits_router": False})
    assert "to the best by hindsight" in _sentence(untuned, "Router")
    assert "A better router would gain little (90 % or more)." in _sentence(untuned, "Router")
    assert "which nothing can know beforehand: the bound" in text_of(render(untuned, "quality.html"))


@pytest.mark.slow
def test_paths_that_came_after_the_tuning_are_not_fitted(
    tiny_layerwise_checkpoint: Path, tiny_dense: Path, tiny_text: Path, tmp_path: Path
):
    """The model was tuned under its gates; what is decoupled afterwards it does not know."""
    tune(tiny_options(tiny_layerwise_checkpoint, tiny_text, tmp_path / "tuned", steps=2))
    for predict in (False, True):
        options = DecoupleOptions(tmp_path / "tuned", tmp_path / str(predict), (tiny_text,), steps=2, dim=16)
        decouple(replace(options, predict=predict))
        shown = ReportOptions(tmp_path / str(predict), tmp_path / f"{predict}.html", (tiny_text,), max_tokens=60)
        assert report(shown).model["fits_router"] == predict


def test_curves_say_what_they_were_trained_on_and_by(reported: tuple[Figures, str], tuned: Path, tiny_text: Path):
    html = reported[1]
    manifest = json.loads((tuned / "manifest.json").read_text())
    text, found = manifest["calibration"]["tune"], manifest["figures"]["tune"]
    assert found["steps"] == 6
    assert (
        f"Tuned for 6 steps on {found['tokens']:,} tokens of {tiny_text} ({text['num_tokens']:,} tokens in rows of at "
        "most 64), seed 0, in float32 on cpu: FFNs, attention, norms, embeddings and head (all weights, rate up to "
        "0.003); router, rate up to 0.003. "
    ) in html
    assert (
        "Loss: 0.5 times cross entropy + 0.5 times divergence from the teacher + 0.1 times error of the router's "
        "scores, where they forecast contributions. Teacher: itself before it was tuned, with every expert on. "
    ) in html
    assert (
        f"Held-back text: {text['num_validation_tokens']:,} tokens of {text['num_validation_rows']} documents kept "
        "back from that text, measured in float32 every 6 steps and at the end; the weights are those of step "
        f"{found['best_step']}, the best of these."
    ) in html


def test_other_trainings_are_told_apart(reported: tuple[Figures, str]):
    figures = reported[0]
    figures = replace(figures, training=figures.training[:1])
    tuning = figures.tuning
    assert tuning is not None
    asked = tuning["asked"] | {"method": "lora", "router": False, "backbone": False, "kl_share": 0, "hidden_match": 5.0}
    asked |= {"teacher": "T", "balance": "loss", "balance_loss": 0.01, "validation": ["V", "<b>W"]}
    outcome = tuning["outcome"] | {"refit": True}
    html = text_of(render(replace(figures, tuning=tuning | {"asked": asked, "outcome": outcome}), "training.html"))
    assert "FFNs (low-rank changes of rank 8, rate up to 0.003); the router's scores as they were. Loss: 1 " in html
    assert "Loss: 1 times cross entropy + 5 times error of the layers' outputs" in html
    assert "+ 0.01 times Switch's balancing loss. Teacher: T. Held-back" in html
    assert (
        "documents of V, <b>W, measured in float32 every 6 steps and at the end (step 0 twice: before and after" in html
    )
    untaught = text_of(
        render(replace(figures, tuning=tuning | {"asked": tuning["asked"] | {"kl_share": 0}}), "training.html")
    )
    assert "Loss: 1 times cross entropy + 0.1 times error of the router" in untaught
    assert "Teacher: " not in untaught
    assert "The manifest does not say, or not in full, what this was trained on" in render(
        replace(figures, tuning=None), "training.html"
    )


def test_options_and_what_came_of_them_are_kept_apart(tuned: Path):
    manifest = read_manifest(tuned)
    found = manifest.figures["tune"]
    options = manifest.options | {"tune": manifest.options["tune"] | {"steps": 99, "tokens": 9, "seed": 7}}
    tuning = tuning_of(replace(manifest, options=options))
    assert tuning is not None
    assert [tuning["outcome"][name] for name in ("steps", "tokens")] == [6, found["tokens"]]
    assert tuning["asked"]["seed"] == 7
    for part in ("options", "calibration", "figures"):
        assert tuning_of(replace(manifest, **{part: {}})) is None
        said = getattr(manifest, part)
        for name in {"rank", "num_tokens", "best_step"} & said["tune"].keys():
            short = {key: value for key, value in said["tune"].items() if key != name}
            assert tuning_of(replace(manifest, **{part: said | {"tune": short}})) is None
