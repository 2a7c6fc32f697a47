"""`tune` from folder to folder on tiny models: what it changes, what it keeps, what it says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pregate.base.errors import UserError
from pregate.convert.files.dense import load_dense
from pregate.convert.measure.evaluate import EvaluateOptions, evaluate
from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.convert.tune.data import TuningRows, read_rows
from pregate.convert.tune.loop import Tuner
from pregate.convert.tune.options import DEFAULT_MATCH, DEFAULT_TOKENS, TuneOptions, TuningSettings
from pregate.convert.tune.run import load_teacher, tune
from pregate.model import CheckpointReader, RoutedForCausalLM
from pregate.model.checkpoint import read_manifest
from pregate.model.folder import read_folder
from pregate.model.read_check import Hashes
from tests.convert.tune.tuning import paper_checkpoint, tiny_options


@pytest.fixture(scope="module")
def paper(tiny_dense: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paper_checkpoint(tiny_dense, tiny_text, tmp_path_factory.mktemp("paper") / "paper")


@pytest.fixture
def options(tiny_path_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> TuneOptions:
    return tiny_options(tiny_path_checkpoint, tiny_text, tmp_path / "out")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}


def changed(before: Path, after: Path) -> set[str]:
    old, new = tensors_of(before), tensors_of(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def curve_of(folder: Path) -> tuple[list[dict], list[dict]]:
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return [x for x in lines if "loss" in x], [x for x in lines if "validation_perplexity" in x]


def test_it_recovers_and_says_so(options: TuneOptions, tiny_path_checkpoint: Path):
    options = replace(options, steps=40, eval_every=20)
    manifest = tune(options)
    steps, evaluations = curve_of(options.out)
    assert [x["step"] for x in steps] == list(range(1, 41))
    assert steps[-1].keys() == {"step", "tokens", "seconds", "loss", "cross_entropy", "kl", "learning_rate"}
    assert [x["step"] for x in evaluations] == [0, 20, 40]
    assert evaluations[-1].keys() == {"step", "tokens", "seconds", "validation_perplexity", "active_share"}
    assert sum(x["loss"] for x in steps[-5:]) < 0.8 * sum(x["loss"] for x in steps[:5])
    figures = manifest.figures["tune"]
    assert figures["validation_perplexity_after"] < 0.5 * figures["validation_perplexity_before"]
    assert figures["active_share_after"] == pytest.approx(0.5, abs=0.04)  # S2A2E8, on other documents than were set on
    assert (figures["steps"], figures["tokens"]) == (40, steps[-1]["tokens"])
    assert manifest.method == "cmoe+decouple+tune"
    assert manifest.options["tune"]["kl_share"] == 0.5
    assert manifest.options["decouple"]["steps"] == 30  # what was said before is kept
    assert "training.jsonl" in manifest.files
    reader = CheckpointReader(options.out, hashes=Hashes.FIRST)
    assert reader.config.routing == "path"
    assert sorted(p.name for p in options.out.parent.iterdir()) == ["out"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_is_refitted_before_the_first_step(options: TuneOptions, method: str):
    """With no time to tune the refit alone is what is written."""
    options = replace(options, refit=True, steps=None, minutes=1e-9, router=False, method=method)
    figures = tune(options).figures["tune"]
    assert figures["steps"] == 0
    assert len(figures["refit"]["missing_left"]) == 3
    assert max(figures["refit"]["missing_left"]) < 0.9
    assert figures["refit"]["validation_perplexity"] < figures["validation_perplexity_before"]
    assert figures["validation_perplexity_after"] == pytest.approx(figures["refit"]["validation_perplexity"], rel=1e-3)
    names = changed(options.model, options.out)
    assert all(n.endswith(("down_proj", "mass_threshold")) for n in names)
    assert [x["step"] for x in curve_of(options.out)[1]][:2] == [0, 0]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_checkpointing_changes_nothing_else(options: TuneOptions, method: str):
    options = replace(options, method=method, hidden_match=1.0, steps=4)
    tune(options)
    again = replace(options, out=options.out.with_name("again"), gradient_checkpointing=True)
    assert tune(again).options["tune"]["gradient_checkpointing"]
    assert changed(options.out, again.out) == set()
    assert len(changed(options.model, again.out)) > 20


@torch.no_grad()
def test_what_is_said_of_the_tuned_model_is_of_the_one_written(options: TuneOptions, monkeypatch: pytest.MonkeyPatch):
    """Share and load as the pass of tuning counts them; and they are found in the one run that scores it."""
    scored, found = [], Tuner.evaluate
    monkeypatch.setattr(Tuner, "evaluate", lambda tuner: scored.append(1) or found(tuner))
    figures = tune(options).figures["tune"]
    assert len(scored) == 3  # before the first step, at the sixth and at the last
    rows = read_rows(options.text, read_folder(options.model).tokenizer, 64, 0.2, 0)
    model = RoutedForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    stored = found(Tuner(model, rows, replace(options, kl_share=0.0)))
    assert figures["active_share_after"] == pytest.approx(stored.active_share, abs=1e-3)
    assert figures["load_imbalance_after"] == pytest.approx(stored.imbalance, abs=0.02)
    assert figures["validation_perplexity_after"] == pytest.approx(stored.perplexity, rel=1e-3)
    assert min(figures["load_imbalance_after"]) > 1


def test_the_best_state_is_kept(options: TuneOptions, tiny_path_checkpoint: Path):
    """With a rate that breaks the model the best is where it began: nothing but the curve is new."""
    manifest = tune(replace(options, learning_rate=3.0))
    assert manifest.figures["tune"]["best_step"] == 0
    assert changed(options.model, options.out) == set()
    assert len(curve_of(options.out)[0]) == 12


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_not_to_be_tuned_stays_bit_for_bit(options: TuneOptions, method: str):
    tune(replace(options, method=method, router=False, backbone=False))
    names = changed(options.model, options.out)
    assert any(".experts." in n for n in names)
    assert any(".shared." in n for n in names)
    assert all(".experts." in n or ".shared." in n or n.endswith("mass_threshold") for n in names)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_router_alone_learns_from_the_output_of_a_model_that_stays(options: TuneOptions, method: str):
    options = replace(options, method=method, ffn=False, backbone=False, steps=40, eval_every=20)
    figures = tune(options).figures["tune"]
    assert figures["validation_perplexity_after"] < figures["validation_perplexity_before"]
    assert "refit" not in figures
    names = changed(options.model, options.out)
    assert any(n.startswith("path_router.blocks") for n in names)
    assert all(n.startswith("path_router.") or n.endswith("mass_threshold") for n in names)


def test_where_nothing_is_left_to_tune_that_is_said(options: TuneOptions):
    with pytest.raises(UserError, match="nothing is left to tune; allowed: one of them"):
        tune(replace(options, ffn=False, backbone=False, router=False))


def test_everything_is_tuned_but_the_gates_not_in_use(options: TuneOptions):
    tune(options)
    names = changed(options.model, options.out)
    assert {n for n in names if n.startswith("path_router.")}
    assert any("self_attn" in n for n in names)
    assert any("embed_tokens" in n for n in names)
    assert not [n for n in names if "linear_gate" in n or "paper_gate" in n or "neuron_" in n]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_scale_by_which_a_gate_weighs_is_learned(paper: Path, tiny_text: Path, tmp_path: Path, method: str):
    """A defect of CMoE's released code: wrapped for LoRA its scale u is frozen, and no gradient reaches the gate."""
    options = tiny_options(paper, tiny_text, tmp_path / "out", method=method)
    rows = read_rows(options.text, read_folder(paper).tokenizer, 64, 0.2, 0)
    model = RoutedForCausalLM.from_pretrained(paper, dtype=torch.float32)
    tuner = Tuner(model, rows, options, load_teacher(options, None, model))
    loss, _, _ = tuner._losses(rows.training[:4], 100)
    loss.backward()
    for mlp in model.routed_mlps:
        assert mlp.paper_gate.scale.grad.abs().min() > 0
        assert mlp.paper_gate.weight.grad.abs().max() > 0
    tune(options)
    names = changed(paper, options.out)
    assert {n for n in names if n.endswith("paper_gate.scale")} == {
        f"parent.model.layers.{layer}.mlp.paper_gate.scale" for layer in range(3)
    }
    tuned = RoutedForCausalLM.from_pretrained(options.out).eval()
    weights = tuned.routed_mlps[0].gate.choose(torch.randn(5, 64)).weights
    assert weights is not None
    assert (weights - 1).abs().min() > 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_so_is_a_path_routers_with_the_paths_as_they_were(
    tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path: Path, method: str
):
    """--no-router freezes what chooses: the scores and thresholds, and not the weights of what was chosen."""
    learned = tmp_path / "learned"
    decouple(DecoupleOptions(tiny_layerwise_checkpoint, learned, (tiny_text,), steps=20, dim=16, weights="learned"))
    options = tiny_options(learned, tiny_text, tmp_path / "out", method=method, router=False)
    assert tune(options).figures["tune"]["best_step"] > 0
    names = changed(learned, options.out)
    assert {n for n in names if n.startswith("path_router.")} == {"path_router.scale"}
    before, after = (RoutedForCausalLM.from_pretrained(path).eval() for path in (learned, options.out))
    paths = after.paths(list(range(40)))
    assert (paths.ids == before.paths(list(range(40))).ids).all()
    assert paths.weights is not None
    assert abs(paths.weights[paths.ids >= 0] - 1).min() > 0


@pytest.mark.parametrize("which", ["tied", "untied"])
@torch.no_grad()
def test_reloaded_it_is_what_was_tuned(which: str, tiny_text: Path, family_folder: Any, options: TuneOptions):
    """A defect of Read-ME's released code: loading a checkpoint overwrites its embeddings with the base model's."""
    if which == "tied":
        options = replace(options, model=family_folder("llama tied") / "path")
    rows = read_rows(options.text, read_folder(options.model).tokenizer, 64, 0.2, 0)
    model: Any = RoutedForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    before = model.get_input_embeddings().weight.clone()
    tuner = Tuner(model, rows, options, load_teacher(options, None, model))
    tuner.run()
    tuner.finish()
    tune(options)  # the same once more, through the folder
    loaded: Any = RoutedForCausalLM.from_pretrained(options.out, dtype=torch.float32).eval()
    embeddings = loaded.get_input_embeddings().weight
    assert torch.equal(embeddings, model.get_input_embeddings().weight)
    assert not torch.equal(embeddings, before)
    assert (loaded.get_output_embeddings().weight is embeddings) == (which == "tied")
    ids = torch.tensor([[1, 5, 9, 30, 77, 200]])
    assert torch.equal(loaded(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kl_share", [0.0, 0.5])
def test_a_dense_model_is_tuned_alike(tiny_dense: Path, tiny_text: Path, tmp_path: Path, method: str, kl_share: float):
    options = tiny_options(tiny_dense, tiny_text, tmp_path / "out", method=method, kl_share=kl_share)
    manifest = tune(options)
    assert manifest.method == "dense+tune"
    assert (
        manifest.figures["tune"]["validation_perplexity_after"]
        < manifest.figures["tune"]["validation_perplexity_before"]
    )
    assert "active_share_after" not in manifest.figures["tune"]
    steps, _ = curve_of(options.out)
    assert (steps[0]["kl"] < 1e-6) and ((steps[-1]["kl"] > 1e-4) == (kl_share > 0))  # it starts as its own teacher
    assert AutoModelForCausalLM.from_pretrained(options.out).config.model_type == "llama"
    result = evaluate(EvaluateOptions(options.out, (tiny_text,), max_tokens=200))
    assert result["perplexity"] < evaluate(EvaluateOptions(tiny_dense, (tiny_text,), max_tokens=200))["perplexity"]


@pytest.mark.parametrize(
    ("balance", "changes"), [("bias", {"router": False, "balance_rate": 0.05}), ("loss", {"balance_loss": 10.0})]
)
def test_balancing_makes_the_load_more_even(options: TuneOptions, balance: str, changes: dict):
    """Summed over layers, what the busiest expert has beyond its share, on the text that is tuned on."""
    options = replace(options, steps=30, eval_every=30, router_mass=0.0, **changes)
    training = read_rows(options.text, read_folder(options.model).tokenizer, 64, 0.2, 0).training

    def excess(balance: str) -> float:
        model = RoutedForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        settings = replace(options, balance=balance)
        tuner = Tuner(model, TuningRows(training, training), settings, load_teacher(settings, None, model))
        tuner.run()
        found = tuner.evaluate()
        assert found.active_share == pytest.approx(0.5, abs=0.02)
        return sum(found.imbalance) - 3

    assert excess(balance) < 0.6 * excess("none")


def test_a_loss_that_is_not_finite_ends_the_run(options: TuneOptions):
    with pytest.raises(UserError, match=r"learning_rate 1e\+30: the loss is nan at step \d+; a lower rate"):
        tune(replace(options, learning_rate=1e30))


@pytest.mark.parametrize("factor", [math.nan, 1e8])
def test_an_evaluation_that_is_not_finite_is_not_the_best(options: TuneOptions, factor: float):
    model: Any = RoutedForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    rows = TuningRows([[1, 7, 9, 11, 13]], [[1, 44, 300, 16]])
    tuner = Tuner(model, rows, TuningSettings(steps=9, kl_share=0, patience=2))
    first = tuner.measure()
    best = {name: tensor.clone() for name, tensor in tuner.best.items()}
    model.get_output_embeddings().weight.data.mul_(factor)
    for worse in (1, 2):
        found = tuner.measure().perplexity
        assert math.isnan(found) if math.isnan(factor) else found == math.inf
        assert (tuner.counters.best, tuner.counters.best_step) == (first.perplexity, 0)
        assert tuner.counters.worse_since == worse
        if math.isnan(factor) and worse == 1:
            with pytest.raises(UserError, match="the loss is nan at step 1;"):
                tuner.run(num_steps=1)
    assert tuner.share_done == 1  # by patience
    assert all(torch.equal(tensor, best[name]) for name, tensor in tuner.best.items())


def test_batches_of_a_step_are_as_one(options: TuneOptions):
    """Two batches of a step have the gradient of one that holds the rows of both."""
    rows = read_rows(options.text, read_folder(options.model).tokenizer, 64, 0.2, 0)

    def gradients(parts: list[list[list[int]]]) -> dict[str, torch.Tensor]:
        model = RoutedForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        settings = TuningSettings(steps=1, router_mass=0, hidden_match=0, accumulate=len(parts))
        tuner = Tuner(model, rows, settings, load_dense(read_folder(Path(read_manifest(options.model).source["path"]))))
        total = sum(len(row) - 1 for part in parts for row in part)
        for part in parts:
            tuner._losses(part, total)[0].backward()
        return {n: p.grad for n, p in tuner.trained.model.items() if p.grad is not None}

    batch = rows.training[:6]
    whole, parts = gradients([batch]), gradients([batch[:2], batch[2:]])
    assert len(whole) > 20
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=2e-3, atol=2e-5, msg=name)


def test_half_precision_products_with_float32_weights(options: TuneOptions):
    """What runs on a GPU, here on the CPU: the curve is that of float32 up to rounding."""
    tune(replace(options, precision="bfloat16"))
    half, _ = curve_of(options.out)
    tune(replace(options, out=options.out.with_name("float32")))
    full, _ = curve_of(options.out.with_name("float32"))
    losses = [[x["loss"] for x in curve] for curve in (half, full)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert all(t.dtype != torch.bfloat16 for t in tensors_of(options.out).values())


def test_weights_stay_in_the_type_they_were_stored_in(
    tiny_dense: Path, tiny_text: Path, options: TuneOptions, tmp_path: Path
):
    from pregate.convert.cut.conversion import convert
    from pregate.convert.cut.options import ConvertOptions

    half = tmp_path / "half"
    convert(ConvertOptions(tiny_dense, half, 8, 2, 2, (tiny_text,), samples=2, sequence_length=32, dtype="bfloat16"))
    manifest = tune(replace(options, model=half))
    assert CheckpointReader(options.out).read_unit(1, 0)[1].dtype == torch.bfloat16
    model = RoutedForCausalLM.from_pretrained(options.out)
    assert model.routed_mlps[0].linear_gate.weight.dtype == torch.float32
    figures = manifest.figures["tune"]
    assert figures["validation_perplexity_after"] < figures["validation_perplexity_before"]


def test_patience_ends_a_run(options: TuneOptions):
    manifest = tune(replace(options, learning_rate=3.0, patience=2, steps=60, eval_every=3))
    assert manifest.figures["tune"]["steps"] == 6
    assert manifest.figures["tune"]["best_step"] == 0


@pytest.mark.parametrize(("budget", "steps"), [({"tokens": 600}, 5), ({"minutes": 1e-9}, 0)])
def test_other_budgets(options: TuneOptions, budget: dict, steps: int):
    figures = tune(replace(options, steps=None, batch_tokens=192, **budget)).figures["tune"]
    assert figures["steps"] == steps
    assert figures["tokens"] >= budget.get("tokens", 0)


def test_without_a_budget_there_is_one(options: TuneOptions):
    assert replace(options, steps=None).token_budget == DEFAULT_TOKENS
    assert options.token_budget is None
    assert options.share_done(3, 0, 0.0) == 0.25


def test_layers_are_matched_where_there_is_a_teacher_to_match(options: TuneOptions):
    assert replace(options, hidden_match=None).matching == DEFAULT_MATCH
    assert replace(options, hidden_match=None, kl_share=0.0).matching == 0
    assert not replace(options, hidden_match=None, kl_share=0.0).wants_teacher
    options = replace(options, kl_share=0.0, router_mass=0.0)
    tune(replace(options, hidden_match=2.0))
    matched, _ = curve_of(options.out)
    tune(replace(options, out=options.out.with_name("plain")))
    plain, _ = curve_of(options.out.with_name("plain"))
    assert matched[0]["cross_entropy"] == pytest.approx(plain[0]["cross_entropy"])
    assert matched[0]["loss"] > plain[0]["loss"] + 0.02
    assert plain[0]["loss"] == pytest.approx(plain[0]["cross_entropy"], rel=1e-5)


def test_controls_of_a_tuned_checkpoint_go_by_its_recorded_parent(options: TuneOptions, tiny_dense: Path):
    tune(replace(options, steps=8))
    text = options.text[0]
    printed = evaluate(EvaluateOptions(options.out, (text,), max_tokens=200, controls=True))["controls"]["dense parent"]
    assert printed["perplexity"] == evaluate(EvaluateOptions(tiny_dense, (text,), max_tokens=200))["perplexity"]
    manifest = json.loads((options.out / "manifest.json").read_text())
    manifest["source"]["path"] = "/nowhere"
    (options.out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"was tuned, so with every expert on .*; give the dense model with parent"):
        evaluate(EvaluateOptions(options.out, (text,), max_tokens=200, controls=True))
