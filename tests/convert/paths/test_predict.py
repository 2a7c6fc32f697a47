"""`decouple --predict`: the gates decide as before, and the path router's forecast of them is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from pregate.base.errors import UserError
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.measure.agreement import AgreementMeter, layer_figures
from pregate.convert.measure.evaluate import EvaluateOptions, evaluate
from pregate.convert.measure.scoring import score_rows
from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.convert.paths.targets import collect_targets
from pregate.convert.progress import QUIET
from pregate.convert.tune.data import read_rows
from pregate.convert.tune.run import tune
from pregate.model import RoutedForCausalLM
from pregate.model.checkpoint import Manifest
from pregate.model.folder import read_folder
from pregate.model.gates import Choice, LinearGate
from pregate.model.layers import RoutedMLP
from tests.convert.interruption import StopsAfter
from tests.convert.tune.tuning import tiny_options
from tests.equality import reference_texts
from tests.router.serving import engine_in_process, hold


@pytest.fixture(scope="module")
def made(tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory):
    """Options, manifest and folder of a forecast for the tiny layer-wise checkpoint, trained for 120 steps."""
    out = tmp_path_factory.mktemp("predict") / "out"
    options = DecoupleOptions(tiny_layerwise_checkpoint, out, (tiny_text,), steps=120, dim=32, predict=True)
    return options, decouple(options), out


@torch.no_grad()
def test_the_output_is_that_of_the_model_without_the_router(
    made: tuple[DecoupleOptions, Manifest, Path], tiny_layerwise_checkpoint: Path
):
    before = RoutedForCausalLM.from_pretrained(tiny_layerwise_checkpoint).eval()
    after = RoutedForCausalLM.from_pretrained(made[2]).eval()
    assert (after.config.routing, after.config.has_path_router) == ("layerwise", True)
    ids = torch.tensor([AutoTokenizer.from_pretrained(made[2])("The harbour lay quiet before the storm.")["input_ids"]])
    assert torch.equal(after(ids).logits, before(ids).logits)
    added = set(after.state_dict()) - set(before.state_dict())
    assert added and all(name.startswith("path_router.") for name in added)
    assert after.paths(ids[0].tolist()).ids.shape[:2] == (ids.shape[1], 3)


def test_the_manifest_tells_how_often_the_forecast_is_right(made: tuple[DecoupleOptions, Manifest, Path]):
    options, manifest, _ = made
    figures = manifest.figures["decouple"]
    hits = figures["path_vs_gate"]
    assert hits["layers"] == [0, 1, 2]
    assert sum(hits["mean_overlap_by_layer"]) / 3 == pytest.approx(hits["mean_overlap"], abs=1e-3)
    # Measured on documents it has not seen; an untrained one gets a third and less.
    poor = decouple(replace(options, steps=1, out=options.out.parent / "poor")).figures["decouple"]["path_vs_gate"]
    assert hits["mean_overlap"] > poor["mean_overlap"] + 0.1
    assert {"path_perplexity", "path_active_share"}.isdisjoint(figures)
    assert manifest.options["decouple"]["predict"] is True


def test_evaluate_prints_the_hit_rate_layer_by_layer(
    made: tuple[DecoupleOptions, Manifest, Path], tiny_layerwise_checkpoint: Path, tiny_text: Path
):
    with_router = evaluate(EvaluateOptions(made[2], (tiny_text,), max_tokens=300))
    without = evaluate(EvaluateOptions(tiny_layerwise_checkpoint, (tiny_text,), max_tokens=300))
    rate = with_router["forecast_hit_rate"]
    assert len(rate["same_set_by_layer"]) == len(rate["mean_overlap_by_layer"]) == len(rate["layers"]) == 3
    assert rate["same_set"] == with_router["agreement"]["path_vs_gate"]["same_set"]
    assert "forecast_hit_rate" not in without
    assert with_router["perplexity"] == without["perplexity"]
    assert with_router["active_share"] == without["active_share"]


@torch.no_grad()
def test_targets_of_a_forecast_are_what_the_gates_go_by(tiny_layerwise_checkpoint: Path):
    """Layer by layer the scores, and the limit and the mean number of experts that the gates themselves have."""
    model = RoutedForCausalLM.from_pretrained(tiny_layerwise_checkpoint, dtype=torch.float32).eval()
    rows = [[1, 7, 9, 11, 13], [1, 44]]
    pool = collect_targets(model, rows, QUIET, of_gates=True)
    seen: list[list[int]] = [[], [], []]

    class Counting:
        def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
            choice = mlp.gate.choose(x_TD)
            seen[mlp.layer].extend((choice.ids >= 0).sum(1).tolist())
            return choice

    model.routing_policy = Counting()
    for row in rows:
        model(torch.tensor([row]), use_cache=False)
    assert pool.mean_active == pytest.approx([sum(numbers) / 7 for numbers in seen])
    for mlp, limit in zip(model.routed_mlps, pool.limits, strict=True):
        assert isinstance(mlp.gate, LinearGate)
        assert limit == mlp.gate.threshold


def test_a_forecast_is_served_and_changes_nothing(made: tuple[DecoupleOptions, Manifest, Path]):
    model = RoutedForCausalLM.from_pretrained(made[2]).eval()
    prompts = [[1, *range(30, 30 + n * 7, 7)] for n in (5, 40)]
    references = reference_texts(model, prompts, 12)
    with engine_in_process(made[2], 2) as engine:
        assert (engine.info()["routing"], engine.info()["has_path_router"]) == ("layerwise", True)
        hold(engine, "predicted", references, together=(True,))
        forecast = engine.route(prompts[0])
        assert not forecast.exact
        assert (forecast.ids == model.paths(prompts[0]).ids).all()


def test_the_papers_gate_can_be_forecast(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    """It ranks by softmax and takes a fixed number; weights it has learned stay its own."""
    method = {"gate": "representative", "selection": "top_k", "samples": 2, "sequence_length": 32}
    convert(ConvertOptions(tiny_dense, tmp_path / "paper", 8, 2, 2, (tiny_text,), **method))
    options = DecoupleOptions(tmp_path / "paper", tmp_path / "out", (tiny_text,), steps=60, dim=32, predict=True)
    figures = decouple(options).figures["decouple"]
    assert figures["path_vs_gate"]["mean_overlap"] > 0.4  # chance: a third
    with pytest.raises(UserError, match="weights learned: allowed with predict: one"):
        replace(options, weights="learned")


def test_tuning_measures_the_forecast_anew(
    made: tuple[DecoupleOptions, Manifest, Path], tiny_text: Path, tmp_path: Path
):
    """Tuning moves the gates and not their forecast: what was measured on them before is theirs no more."""
    options = tiny_options(made[2], tiny_text, tmp_path / "out", learning_rate=1e-2, router_learning_rate=1e-2)
    progress = StopsAfter(-1)
    figures = tune(options, progress).figures
    assert figures["tune"]["best_step"] > 0
    assert figures["decouple"] == made[1].figures["decouple"]  # of the gates as they were
    hits, meter = figures["tune"]["path_vs_gate"], AgreementMeter()
    rows = read_rows(options.text, read_folder(made[2]).tokenizer, 64, 0.2, 0).held_back
    score_rows(RoutedForCausalLM.from_pretrained(options.out, dtype=torch.float32).eval(), rows, meter)
    assert hits == layer_figures(meter.forecast)
    stale = AgreementMeter()
    score_rows(RoutedForCausalLM.from_pretrained(made[2], dtype=torch.float32).eval(), rows, stale)
    assert hits != layer_figures(stale.forecast)
    kept = f"now it shares {100 * hits['mean_overlap']:.1f} % of their picks"
    assert [note for note in progress.notes if "forecast" in note and kept in note]
