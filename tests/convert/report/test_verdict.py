"""The verdict: no more is claimed than a comparison with a dense model trained alike can show."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pregate.base.errors import UserError
from pregate.convert.measure.evaluate import EvaluateOptions, evaluate
from pregate.convert.report.figures import Figures, QualityPoint
from pregate.convert.report.page import render
from pregate.convert.report.training import TunedParent, tuned_parent
from pregate.convert.report.words import headline
from pregate.convert.tune.run import tune
from pregate.model.checkpoint import Manifest, read_manifest
from tests.convert.report.pages import findings, make_report, text_of
from tests.convert.tune.tuning import tiny_options

ALIKE = TunedParent("dense-tuned", recorded=True)


def _figures(figures: Figures, own: float, is_tuned: bool, parent: float | None = None, how: TunedParent | None = None):
    """`exact`'s with the perplexities `own` of the checkpoint and `parent` of the tuned dense model; 100 untuned."""
    quality = figures.quality
    point = replace(quality.own_point, perplexity=own, ratio_to_dense=own / 100)
    points = tuple(point if p.name == quality.own else p for p in quality.controls)
    tuned = None if parent is None else QualityPoint("tuned dense parent", 1.0, parent, parent / 100, 1.0)
    model = figures.model | {"is_tuned": is_tuned, "fits_router": is_tuned}
    changed = replace(quality, controls=points, tuned_parent=tuned)
    return replace(figures, model=model, quality=changed, tuned_parent=how)


@pytest.mark.parametrize(("own", "much"), [(99, "no"), (100, "no"), (104, "little"), (120, "some"), (126, "much")])
def test_an_untuned_checkpoint_is_held_to_its_parent(exact: tuple[Figures, str], own: float, much: str):
    verdict = headline(_figures(exact[0], own, is_tuned=False))
    assert f"of the FFN costs {much} quality: perplexity is {own / 100:.2f} times the dense model's; " in verdict


def test_a_tuned_checkpoint_claims_nothing_beside_an_untuned_parent(exact: tuple[Figures, str]):
    figures = _figures(exact[0], 99, is_tuned=True)
    verdict = headline(figures)
    assert "quality" not in verdict
    assert (
        "gives 0.99 times the perplexity of the untuned dense model; only one tuned alike (--tuned-parent)" in verdict
    )
    mark, sentence = findings(render(figures, "findings.html"))["Quality"]
    assert mark == "mixed"
    assert "The two were not trained alike, so this does not tell what the cut costs" in sentence
    assert "it can stand in for the dense model" not in sentence


def test_a_tuned_checkpoint_is_held_to_the_parent_tuned_alike(exact: tuple[Figures, str]):
    """The very case: 0.99 of the untuned model, and 5 % behind the one tuned alike."""
    figures = _figures(exact[0], 99.0, True, 94.0, ALIKE)
    assert "costs some quality: perplexity is 1.05 times that of the dense model tuned alike; " in headline(figures)
    mark, sentence = findings(render(figures, "findings.html"))["Quality"]
    assert mark == "mixed"
    assert "1.053 times that of the dense model tuned alike" in sentence
    assert "94.00 of the tuned dense model" in sentence
    assert "1.053" in text_of(render(figures, "quality.html"))


def test_a_parent_tuned_otherwise_shows_nothing(exact: tuple[Figures, str]):
    otherwise = replace(ALIKE, differences=("text", "tokens seen: 9 against 99"))
    figures = _figures(exact[0], 90.0, True, 94.0, otherwise)
    assert "gives 0.96 times the perplexity of the dense model tuned otherwise (text, tokens seen: 9" in headline(
        figures
    )
    assert "quality" not in headline(figures)
    assert findings(render(figures, "findings.html"))["Quality"][0] == "mixed"


def test_what_no_manifest_tells_is_said(exact: tuple[Figures, str]):
    figures = _figures(exact[0], 90.0, True, 94.0, TunedParent("x", recorded=False))
    assert "costs no quality: perplexity is 0.96 times that of the dense model given as tuned alike" in headline(
        figures
    )
    assert "no manifest tells it" in findings(render(figures, "findings.html"))["Quality"][1]


def _manifest(**changes) -> Manifest:
    fields = {"tokens": 1000, "text": ["a.txt"], "sequence_length": 64, "hash": "1", "method": "cmoe+tune"} | changes
    return Manifest(
        method=fields["method"],
        options={"tune": {"text": fields["text"], "sequence_length": fields["sequence_length"], "seed": 0}},
        source={"path": "dense", "sha256": {"model.safetensors": fields["hash"]}},
        calibration={"tune": {"files": fields["text"], "num_tokens": 5000}},
        figures={"tune": {"tokens": fields["tokens"]}},
    )


def _folder(tmp_path: Path, manifest: Manifest) -> Path:
    (tmp_path / "manifest.json").write_text(json.dumps(vars(manifest)))
    return tmp_path


def test_manifests_tell_trainings_apart(tmp_path: Path):
    def differences(**changes) -> tuple[str, ...]:
        dense = _manifest(**({"method": "dense+tune"} | changes))
        found = tuned_parent(_folder(tmp_path, dense), Path("model"), _manifest())
        assert found.recorded
        return found.differences

    assert differences() == differences(tokens=1040) == ()
    assert differences(tokens=900) == ("tokens seen: 900 against 1,000",)
    assert differences(text=["b.txt"], sequence_length=32) == ("text", "sequence length")
    assert differences(method="dense+tune+tune") == ("times tuned",)


def test_what_cannot_be_the_tuned_parent_is_refused(tmp_path: Path):
    def refusal(theirs: Manifest, ours: Manifest) -> str:
        with pytest.raises(UserError) as error:
            tuned_parent(_folder(tmp_path, theirs), Path("model"), ours)
        return str(error.value)

    assert "model model was not tuned" in refusal(_manifest(), _manifest(method="cmoe"))
    assert "was not tuned: its manifest says 'dense'" in refusal(_manifest(method="dense"), _manifest())
    assert "was tuned from another dense model" in refusal(_manifest(hash="2"), _manifest())
    (tmp_path / "manifest.json").unlink()
    assert not tuned_parent(tmp_path, Path("model"), _manifest()).recorded
    itself = replace(_manifest(), source={"path": str(tmp_path)})
    with pytest.raises(UserError, match="is the dense parent itself"):
        tuned_parent(tmp_path, Path("model"), itself)


@pytest.mark.slow
def test_with_both_tuned_the_page_compares_them(
    tiny_path_checkpoint: Path, tiny_dense: Path, tiny_text: Path, tmp_path: Path
):
    tune(tiny_options(tiny_path_checkpoint, tiny_text, tmp_path / "routed", steps=2))
    tune(tiny_options(tiny_dense, tiny_text, tmp_path / "dense", steps=2))
    figures, html = make_report(tmp_path / "routed", tiny_text, tmp_path, tuned_parent=tmp_path / "dense")
    assert figures.tuned_parent == TunedParent(str(tmp_path / "dense"), recorded=True)
    dense = evaluate(EvaluateOptions(tmp_path / "dense", (tiny_text,), 150))["perplexity"]
    assert figures.quality.tuned_parent.perplexity == dense != figures.quality["dense parent"].perplexity
    assert figures.quality.others == ()
    ratio = figures.quality.own_point.perplexity / dense
    assert f"perplexity is {ratio:.2f} times that of the dense model tuned alike" in text_of(html)
    assert f"--tuned-parent {tmp_path / 'dense'}" in text_of(html)
    assert read_manifest(tmp_path / "dense").method == "dense+tune"
    shutil.rmtree(tmp_path / "dense")
