"""A report's curves: the checkpoint and the oracle at other numbers of experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pregate.cli.main import main
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.measure.scoring import score_rows
from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.convert.progress import QUIET
from pregate.convert.report.figures import Curve, Figures
from pregate.convert.report.measure import measure_quality
from pregate.convert.report.numbers import Numbers, ladders, with_numbers
from pregate.model import RoutedForCausalLM
from tests.convert.report.pages import CUT, ROWS, check_page, load, random_checkpoint, text_of


@pytest.fixture(scope="module", params=["threshold", "top_k"])
def coded(
    request: pytest.FixtureRequest, tiny_dense: Path, tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path_factory
) -> Path:
    """A checkpoint whose path router has gate "dselect", with either selection."""
    folder, layerwise = tmp_path_factory.mktemp("coded"), tiny_layerwise_checkpoint
    if request.param == "top_k":
        layerwise = folder / "layerwise"
        options = ConvertOptions(
            tiny_dense, layerwise, 8, 2, 2, (tiny_text,), samples=2, sequence_length=64, selection="top_k"
        )
        convert(options)
    decouple(DecoupleOptions(layerwise, folder / "path", (tiny_text,), steps=5, dim=16, gate="dselect"))
    return folder / "path"


def test_curves_go_from_no_routed_expert_to_the_dense_model(exact: tuple[Figures, str]):
    figures = exact[0]
    own, oracle = figures.quality.curves
    assert (own.name, oracle.name) == ("path router", "oracle")
    assert own.num_active == oracle.num_active == (0, 1, 2, 3, 4, 5, 6)
    for curve in (own, oracle):
        assert (curve.active_shares[0], curve.active_shares[-1]) == (0.25, 1.0)
        assert list(curve.active_shares) == sorted(curve.active_shares)
        assert curve.perplexities[-1] == pytest.approx(figures.quality.point("dense parent").perplexity, rel=1e-4)
    assert own.perplexities[2] == figures.quality.own_point.perplexity
    assert own.active_shares[3] == pytest.approx(5 / 8, abs=0.03)  # thresholds set on this very text


def test_with_every_expert_on_a_learned_scale_still_counts(tiny_dense: Path, tmp_path: Path):
    """The oracle weighs its experts by 1, so there it is the dense model; the gate weighs them by their scores."""
    model = load(random_checkpoint(tmp_path / "one", tiny_dense, [CUT], gate="representative"))
    plain_own, plain_oracle = [curve.perplexities for curve in _curves(model)]
    model.routed_mlps[0].paper_gate.scale.data.fill_(2.0)
    own, oracle = [curve.perplexities for curve in _curves(model)]
    assert plain_own[-1] == plain_oracle[-1] == oracle[-1]
    with with_numbers(model, ladders(model)[-1], {}):
        assert own[-1] == pytest.approx(score_rows(model, ROWS).perplexity, abs=1e-3)
    assert own[-1] != pytest.approx(oracle[-1], rel=1e-3)
    assert own[0] == oracle[0]


def test_nor_is_a_path_router_of_learned_weights_the_dense_model(
    tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path: Path
):
    options = DecoupleOptions(tiny_layerwise_checkpoint, tmp_path / "path", (tiny_text,), steps=2, dim=16)
    decouple(replace(options, weights="learned"))
    model = load(tmp_path / "path")
    model.path_router.scale.data.fill_(2.0)
    model.forget_path_computer()
    own, oracle = [curve.perplexities for curve in _curves(model)]
    assert own[-1] != pytest.approx(oracle[-1], rel=1e-3)
    assert own[0] == oracle[0]


def _curves(model: RoutedForCausalLM) -> tuple[Curve, ...]:
    return measure_quality(model, ROWS, 1, None, 0, QUIET).curves


def test_a_router_made_for_one_number_of_experts_has_no_curve(
    coded: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out.html"
    words = ["--model", str(coded), "--text", str(tiny_text), "--out", str(out), "--max-tokens", "60", "--json"]
    assert main(["report", *words]) == 0
    quality = json.loads(capsys.readouterr().out)["quality"]
    (oracle,) = quality["curves"]
    assert (quality["own"], oracle["name"]) == ("path router", "oracle")
    assert (oracle["active_shares"][0], oracle["active_shares"][-1]) == (0.25, 1.0)
    by_name = {point["name"]: point["perplexity"] for point in quality["controls"]}
    assert oracle["perplexities"][-1] == pytest.approx(by_name["dense parent"], rel=1e-4)
    assert oracle["perplexities"][oracle["num_active"].index(2)] == by_name["oracle"]
    check_page(out.read_text())
    text = text_of(out.read_text())
    assert "No line for the checkpoint's own router: one with --gate dselect is made for the number" in text


def test_a_router_that_takes_any_number_has_a_curve_and_no_excuse(exact: tuple[Figures, str]):
    assert "No line for" not in exact[1]


@pytest.mark.parametrize("kind", ["tiny_layerwise_checkpoint", "tiny_path_checkpoint", "uneven"])
def test_numbers_are_undone(kind: str, request: pytest.FixtureRequest):
    model = load(request.getfixturevalue(kind))
    before = score_rows(model, ROWS).nats
    limits = {mlp.layer: 0.0 for mlp in model.routed_mlps if mlp.cut.num_routed}
    for numbers in (ladders(model)[0], ladders(model)[-1]):
        with with_numbers(model, numbers, limits):
            assert score_rows(model, ROWS).nats != before
        with pytest.raises(ZeroDivisionError), with_numbers(model, numbers, limits):
            _ = 1 / 0
        assert score_rows(model, ROWS).nats == before
    assert Numbers.of(model) in ladders(model)


def test_layers_that_differ_go_part_of_the_way(uneven: Path):
    steps = [n.by_layer for n in ladders(load(uneven))]
    assert steps[0] == (0, 0, 0)
    assert steps[-1] == (6, 0, 3)
    assert (2, 0, 1) in steps
