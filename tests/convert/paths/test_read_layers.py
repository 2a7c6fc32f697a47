"""`decouple --read-layers`: one network reads a layer's FFN input and names the experts of that layer and all after."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from pregate.base.errors import UserError
from pregate.cli.main import main
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.files.partial import read_state
from pregate.convert.measure.evaluate import EvaluateOptions, evaluate
from pregate.convert.paths import training
from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.convert.paths.size import READ_WIDTHS, SMALL, dense_flops, sized
from pregate.convert.paths.targets import collect_targets
from pregate.convert.progress import QUIET
from pregate.convert.tune.options import TuneOptions
from pregate.convert.tune.run import tune
from pregate.model import RoutedForCausalLM
from pregate.model.layers import weighted_mass
from pregate.model.router_flops import MAX_SHARE, read_flops
from tests.convert.paths.test_decouple_resume import StopsIn, shards, stop
from tests.convert.paths.test_size import REAL, TINY, config_of
from tests.convert.paths.test_size import options as size_options


@pytest.fixture
def options(tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> DecoupleOptions:
    return DecoupleOptions(tiny_layerwise_checkpoint, tmp_path / "out", (tiny_text,), steps=5, dim=16, read_layers=1)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("target", ["mass", "relative", "sets", "paper", "captured"])
def test_training_beats_chance_clearly(options: DecoupleOptions, layer: int, target: Any):
    """Chance: 2 of 6 experts agree with the oracle's in a third of the picks."""
    figures = decouple(replace(options, steps=120, dim=32, read_layers=layer, target=target)).figures["decouple"]
    assert figures["loss_last"] < figures["loss_first"]
    assert figures["read_vs_oracle"]["mean_overlap"] > 0.45
    assert figures["read_vs_oracle"]["layers"] == list(range(layer, 3))
    assert figures["read_active_share"] == pytest.approx(0.5, abs=0.05)
    assert figures["read_perplexity"] > 0 and figures["read_expert_use"][0] == figures["layerwise_expert_use"][0]


@torch.no_grad()
def test_the_rest_of_the_checkpoint_is_unchanged(options: DecoupleOptions, tiny_layerwise_checkpoint: Path):
    manifest = decouple(options)
    before = RoutedForCausalLM.from_pretrained(tiny_layerwise_checkpoint).state_dict()
    model = RoutedForCausalLM.from_pretrained(options.out)
    after = model.state_dict()
    assert {n for n in after if n not in before} == {n for n in after if n.startswith("read_network.")} != set()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    config = model.config
    assert (config.routing, config.gate, config.read_network) == ("layerwise", "read", {"layer": 1, "dim": 16})
    assert manifest.options["decouple"]["read_layers"] == 1
    assert manifest.options["decouple"]["hold_share"] is False


@torch.no_grad()
def test_states_are_the_inputs_of_the_layer_that_is_read(tiny_layerwise_checkpoint: Path):
    model = RoutedForCausalLM.from_pretrained(tiny_layerwise_checkpoint, dtype=torch.float32).eval()
    rows = [[1, 7, 9, 11, 13], [1, 44]]
    pool = collect_targets(model, rows, QUIET, read_layer=1)
    assert pool.states is not None
    assert [m.shape for m in pool.mass] == [(5, 12), (2, 12)]
    assert len(pool.limits) == len(pool.mean_active) == 2
    seen: dict[int, torch.Tensor] = {}

    def see(mlp: Any, args: tuple[torch.Tensor]) -> None:
        seen[mlp.layer] = args[0].reshape(-1, 64)

    for mlp in model.routed_mlps:
        mlp.register_forward_pre_hook(see)
    for row, state, mass in zip(rows, pool.states, pool.mass, strict=True):
        model(torch.tensor([row]), use_cache=False)
        torch.testing.assert_close(state.float(), seen[1], rtol=1e-2, atol=1e-3)
        masses = [weighted_mass(model.routed_mlps[n], seen[n]) for n in (1, 2)]
        torch.testing.assert_close(mass, torch.cat(masses, dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [5, 0])
def test_it_goes_on_where_it_was_and_gives_the_same(
    options: DecoupleOptions, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Interrupted in training, or when nothing but the targets is there."""
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    options = replace(options, steps=7)
    straight = decouple(replace(options, out=tmp_path / "straight"))
    stop(options, "training the read network", number)
    state = read_state(options.out)
    assert state is not None and (state.unit, state.layers_done) == ("step", number // 2 * 2)
    progress = StopsIn()
    resumed = decouple(options, progress)
    assert progress.steps["training the read network"][0] == number // 2 * 2
    assert resumed.figures == straight.figures
    assert shards(options.out) == shards(tmp_path / "straight")


def test_a_layer_at_a_time_it_is_the_same(
    options: DecoupleOptions, tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = decouple(options)
    monkeypatch.setattr("pregate.convert.files.streamed.WHOLE_BYTES", 0)
    monkeypatch.setattr("pregate.convert.files.assembly.MOST_IN_ONE", 0)
    streamed = decouple(replace(options, out=tmp_path / "streamed"))
    assert streamed.figures == whole.figures
    results = [
        evaluate(EvaluateOptions(out, (tiny_text,), max_tokens=300)) for out in (options.out, tmp_path / "streamed")
    ]
    assert results[0] == results[1] | {"model": str(options.out)}
    assert results[0]["paths_known_after_layers"] == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"read_layers": 0}, "read_layers 0: allowed: 1 or more"),
        ({"read_layers": 3}, "read_layers 3: allowed: 1 to 2, of 3 layers"),
        ({"predict": True}, "predict True: not with read_layers"),
        ({"window": 9}, "window 9: not with read_layers"),
        ({"heads": "single"}, "heads single: not with read_layers"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(options: DecoupleOptions, change: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        decouple(replace(options, **change))
    assert list(options.out.parent.iterdir()) == []


def test_models_whose_layers_cannot_be_read(
    options: DecoupleOptions, tiny_dense: Path, tiny_text: Path, tmp_path: Path
):
    cut: Any = {"calibration": (tiny_text,), "samples": 2, "sequence_length": 32}
    convert(ConvertOptions(tiny_dense, tmp_path / "paper", 8, 2, 2, gate="representative", selection="top_k", **cut))
    with pytest.raises(UserError, match="has representative gates; allowed with read_layers: linear"):
        decouple(replace(options, model=tmp_path / "paper"))
    convert(ConvertOptions(tiny_dense, tmp_path / "all", 8, 2, 6, selection="top_k", **cut))
    with pytest.raises(UserError, match="layer 1, from 0, has no experts to choose from"):
        decouple(replace(options, model=tmp_path / "all"))


def test_a_fixed_number_of_experts(options: DecoupleOptions, tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    cut: Any = {"calibration": (tiny_text,), "samples": 2, "sequence_length": 32, "selection": "top_k"}
    convert(ConvertOptions(tiny_dense, tmp_path / "fixed", 8, 2, 2, **cut))
    figures = decouple(replace(options, model=tmp_path / "fixed", steps=60, dim=32)).figures["decouple"]
    assert figures["read_active_share"] == 0.5
    assert figures["read_vs_oracle"]["mean_overlap"] > 0.4
    model = RoutedForCausalLM.from_pretrained(options.out)
    assert not any("thresholds" in name for name in model.state_dict())


def test_the_width_follows_the_model():
    config = config_of(REAL)
    found = sized(size_options(read_layers=4), config)
    assert found.dim in READ_WIDTHS and found.dim is not None
    assert read_flops(found.read_shape(), 576, config.cuts) <= MAX_SHARE * dense_flops(config)
    wider = replace(found, dim=found.dim + 32)
    assert found.dim == READ_WIDTHS[0] or read_flops(wider.read_shape(), 576, config.cuts) > MAX_SHARE * dense_flops(
        config
    )
    assert (found.steps, found.pool_tokens, found.window) == (4500, 400_000, None)
    small = sized(size_options(read_layers=1), config_of(TINY))
    assert (small.dim, small.steps) == (READ_WIDTHS[-1], SMALL["steps"])


def test_what_it_costs(options: DecoupleOptions):
    figures = decouple(options).figures["decouple"]
    assert figures["router_flops_per_token"] == 2 * 16 * (64 + 12)
    assert ("warning" in figures) == (figures["router_flops_share"] > MAX_SHARE)
    assert (
        "the read network costs"
        in decouple(replace(options, dim=64, out=options.out.with_name("wide"))).figures["decouple"]["warning"]
    )


def test_controls_and_what_is_refused(
    tiny_read_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    result = evaluate(EvaluateOptions(tiny_read_checkpoint, (tiny_text,), max_tokens=300, controls=True))
    own, linear = result["controls"]["read network"], result["controls"]["linear gate"]
    assert own["perplexity"] == result["perplexity"] != linear["perplexity"]
    assert own["mean_overlap"] == result["agreement"]["gate_vs_oracle"]["mean_overlap"]
    with pytest.raises(UserError, match="has a read network, which is not tuned"):
        tune(TuneOptions(model=tiny_read_checkpoint, out=tmp_path / "tuned", text=(tiny_text,)))
    with pytest.raises(UserError, match="already decoupled"):
        decouple(DecoupleOptions(tiny_read_checkpoint, tmp_path / "again", (tiny_text,)))
    where = ["--model", str(tiny_read_checkpoint), "--out", str(tmp_path / "stock")]
    assert main(["export", *where, "--format", "qwen2_moe"]) != 0
    assert "the class has no read gate" in capsys.readouterr().err


def test_an_adapter_holds_it(tiny_read_checkpoint: Path, tiny_dense: Path, tmp_path: Path):
    where = ["--model", str(tiny_read_checkpoint), "--parent", str(tiny_dense)]
    assert main(["export", *where, "--format", "adapter", "--out", str(tmp_path / "adapter")]) == 0
    whole = RoutedForCausalLM.from_pretrained(tiny_read_checkpoint).eval()
    made = RoutedForCausalLM.from_pretrained(tmp_path / "adapter", parent=tiny_dense).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(tiny_read_checkpoint)("The harbour lay quiet")["input_ids"]])
    assert torch.equal(made(ids).logits, whole(ids).logits)


def test_a_page_says_when_paths_are_known(tiny_read_checkpoint: Path, tiny_text: Path, tmp_path: Path):
    where = ["--model", str(tiny_read_checkpoint), "--text", str(tiny_text), "--max-tokens", "300"]
    assert main(["report", *where, "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "paths known after 1 layers, gates before" in page
    assert "Known after 1 layers" in page
    config = json.loads((tiny_read_checkpoint / "config.json").read_text())
    assert config["gate"] == "read"
