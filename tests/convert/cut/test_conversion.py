from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pregate.base.errors import UserError
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.cut.ridge import Ridge
from pregate.convert.files import dense
from pregate.convert.files.shards import DenseShards
from pregate.convert.measure.controls import AllPolicy
from pregate.convert.progress import Progress
from pregate.convert.text.calibration import read_calibration
from pregate.model import CheckpointReader, RoutedForCausalLM
from pregate.model.folder import read_folder
from pregate.model.gated_mlp import find_gated_mlps
from pregate.model.layers import weighted_mass
from pregate.model.read_check import Hashes
from tests.families import FAMILIES, save_random


@pytest.fixture
def options(tiny_dense: Path, tiny_text: Path, tmp_path: Path) -> ConvertOptions:
    return ConvertOptions(tiny_dense, tmp_path / "out", 8, 2, 2, (tiny_text,), samples=8, sequence_length=64)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))


def _load(path: Path) -> RoutedForCausalLM:
    return RoutedForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize("shared", [0, 2, 6])
@pytest.mark.parametrize("gate", ["linear", "representative"])
def test_with_all_experts_on_it_is_the_dense_model(options: ConvertOptions, ids: torch.Tensor, shared: int, gate: str):
    method = {"clustering": "marks", "shared_by": "rate"} if shared == 2 else {}
    selection = "threshold" if gate == "linear" else "top_k"
    convert(replace(options, shared=shared, active=1, gate=gate, selection=selection, **method))
    dense = AutoModelForCausalLM.from_pretrained(options.model).eval()
    routed = _load(options.out)
    expected = dense(ids).logits
    assert (routed(ids).logits - expected).abs().max() > 0.1  # it does route
    routed.routing_policy = AllPolicy()
    assert (routed(ids).logits - expected).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("shared", [0, 5])
def test_with_all_experts_active_it_is_the_dense_model_without_a_policy(
    options: ConvertOptions, ids: torch.Tensor, shared: int
):
    """Each gate's threshold is then minus infinity: every expert runs on text that was not calibrated on too."""
    convert(replace(options, shared=shared, active=8 - shared))
    dense = AutoModelForCausalLM.from_pretrained(options.model).eval()
    routed = _load(options.out)
    assert (routed(ids).logits - dense(ids).logits).abs().max() < 1e-4
    gates = [mlp.linear_gate for mlp in routed.routed_mlps]
    assert [gate.threshold.item() for gate in gates if gate is not None] == [-torch.inf] * 3


def test_no_neuron_is_lost_and_every_row_says_where_it_came_from(tiny_dense: Path, tiny_layerwise_checkpoint: Path):
    dense = AutoModelForCausalLM.from_pretrained(tiny_dense)
    for parent, routed in zip(find_gated_mlps(dense), _load(tiny_layerwise_checkpoint).routed_mlps, strict=True):
        index = routed.neuron_index.long()
        assert sorted(index.tolist()) == list(range(parent.width))
        assert routed.shared is not None
        assert routed.experts is not None
        width = routed.cut.shared_width
        assert torch.equal(routed.shared.down_proj, parent.down[:, index[:width]])
        for expert, rows in enumerate(index[width:].split(routed.cut.expert_width)):
            gate, up = routed.experts.gate_up_proj[expert].chunk(2)
            assert torch.equal(gate, parent.gate[rows])
            assert torch.equal(up, parent.up[rows])
            assert torch.equal(routed.experts.down_proj[expert], parent.down[:, rows])


@torch.no_grad()
def test_layers_are_fitted_on_the_outputs_of_converted_layers(options: ConvertOptions):
    """Refit the last layer's linear gate on the inputs it gets in the converted model: the same gate."""
    convert(options)
    model, tokenizer = _load(options.out), AutoTokenizer.from_pretrained(options.out)
    text = read_calibration(options.calibration, tokenizer, options.samples, options.sequence_length, options.seed)
    last = model.routed_mlps[-1]
    seen: list[torch.Tensor] = []
    last.register_forward_pre_hook(lambda _module, args: seen.append(args[0].reshape(-1, 64)))
    model(text.windows, use_cache=False)
    weight, bias = Ridge(seen[0]).fit(weighted_mass(last, seen[0]))
    gate = last.linear_gate
    assert gate is not None
    torch.testing.assert_close(gate.weight.double(), weight, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(gate.bias.double(), bias, rtol=1e-2, atol=1e-2)
    chosen = (gate.choose(seen[0]).ids >= 0).sum() / len(seen[0])
    assert chosen.item() == pytest.approx(last.cut.num_active, abs=0.01)  # the threshold's promise


def test_two_runs_write_the_same_weights(options: ConvertOptions, tmp_path: Path):
    first = convert(options)
    again = convert(replace(options, out=tmp_path / "again"))
    other = convert(replace(options, out=tmp_path / "other", seed=1))
    assert first.files == again.files
    assert all(first.files[f"model-0000{n}-of-00004.safetensors"] for n in range(1, 5))
    assert first.files["model-00001-of-00004.safetensors"] != other.files["model-00001-of-00004.safetensors"]
    assert first.figures == again.figures


@torch.no_grad()
def test_representative_gates_are_unit_rows_of_the_experts(options: ConvertOptions):
    convert(replace(options, gate="representative", selection="top_k"))
    dense = find_gated_mlps(AutoModelForCausalLM.from_pretrained(options.model))
    for parent, routed in zip(dense, _load(options.out).routed_mlps, strict=True):
        gates, ups = routed.get_parameter("paper_gate.weight").chunk(2)
        experts = routed.neuron_index[routed.cut.shared_width :].long().split(routed.cut.expert_width)
        for gate, up, neurons in zip(gates, ups, experts, strict=True):
            cosine = torch.nn.functional.normalize(parent.gate[neurons], dim=-1) @ gate
            best = int(cosine.argmax())
            assert cosine[best] == pytest.approx(1.0, abs=1e-5)
            assert torch.allclose(torch.nn.functional.normalize(parent.up[neurons[best]], dim=0), up, atol=1e-6)


@torch.no_grad()
def test_no_active_expert_is_a_static_mask(options: ConvertOptions, ids: torch.Tensor):
    manifest = convert(replace(options, shared=4, active=0))
    routed = _load(options.out)
    dense = AutoModelForCausalLM.from_pretrained(options.model).eval()
    for parent, mlp in zip(find_gated_mlps(dense), routed.routed_mlps, strict=True):
        parent.down[:, mlp.neuron_index[mlp.cut.shared_width :].long()] = 0
    assert (routed(ids).logits - dense(ids).logits).abs().max() < 1e-4
    assert manifest.figures["agreement"] == {}


def test_storage_type_and_what_lies_in_the_folder(options: ConvertOptions):
    manifest = convert(replace(options, dtype="bfloat16"))
    reader = CheckpointReader(options.out, hashes=Hashes.FIRST)
    assert reader.read_unit(0, 0)[0].dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(options.out)("The harbour")["input_ids"][0] == 1
    assert (options.out / "generation_config.json").exists()
    assert {path.stat().st_mode & 0o777 for path in options.out.iterdir()} == {0o644}  # weights as readable as config
    assert manifest == reader.manifest
    assert manifest.method == "cmoe"
    assert manifest.options["experts"] == 8
    assert manifest.options["calibration"] == [str(options.calibration[0])]
    assert set(manifest.source["sha256"]) == {"config.json", "model.safetensors"}
    assert manifest.calibration["num_tokens"] == 8 * 64
    assert manifest.figures["dense_perplexity"] > 1
    assert 0 < manifest.figures["agreement"]["gate_vs_oracle"]["mean_overlap"] <= 1


def source_of(path: Path) -> dict[str, Any]:
    folder = read_folder(path)
    return dense.source_of(folder, DenseShards.of(folder))


def test_the_source_is_what_is_read(tiny_dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An absolute path, every shard hashed below the bound and none from it on, and no index but the safetensors'."""
    folder = save_random(FAMILIES["llama"], tiny_dense, tmp_path / "dense", max_shard_size="40KB")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder / "consolidated.safetensors")
    monkeypatch.chdir(tmp_path)
    source = source_of(Path("dense"))
    shards = {p.name for p in folder.glob("model-*.safetensors")}
    assert len(shards) > 2
    assert source["path"] == str(folder.resolve())
    assert set(source["sha256"]) == {"config.json", dense.INDEX} | shards
    assert source["hashed"] == "config, index and shards"
    num_bytes = sum((folder / name).stat().st_size for name in shards)
    monkeypatch.setattr(dense, "HASHED_BYTES", num_bytes + 1)
    assert source_of(folder) == source
    monkeypatch.setattr(dense, "HASHED_BYTES", num_bytes)
    assert set(source_of(folder)["sha256"]) == {"config.json", dense.INDEX}
    assert source_of(folder)["hashed"].startswith("config and index alone")


def test_progress_counts_every_layer(options: ConvertOptions):
    steps: list[tuple[str, int]] = []

    class Recorder(Progress):
        def stage(self, name, total):  # pyright: ignore[reportIncompatibleMethodOverride]
            from contextlib import nullcontext

            return nullcontext(lambda n: steps.append((name, n)))

    convert(options, Recorder())
    assert steps.count(("cutting layers", 1)) == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"experts": 12}, "experts 12: does not divide the FFN width 128"),
        ({"shared": 5, "active": 4}, "active 4: with shared 5 it exceeds experts 8; allowed: 0 to 3"),
        ({"shared": 8, "active": 0}, r"shared 8: allowed: 0 to 7"),
        ({"gate": "magic"}, "gate magic: allowed: linear, representative"),
        ({"gate": "representative"}, "selection threshold: allowed with gate representative: top_k"),
        ({"shared_by": "luck"}, "shared_by luck: allowed: capture, contribution, rate"),
        ({"clustering": "marks"}, "shared_by capture: allowed with clustering marks: contribution, rate"),
        ({"dtype": "int8"}, "dtype int8: allowed: float32, float16, bfloat16"),
        ({"samples": 0}, "samples 0: allowed: 1 or more"),
        ({"sequence_length": 1}, "sequence_length 1: allowed: 2 or more"),
        ({"marks_per_token": 200}, "marks_per_token 200: allowed: 1 to 128"),
        ({"model": Path("/nowhere")}, "model /nowhere: no such path"),
        ({"calibration": (Path("/nowhere.txt"),)}, "calibration /nowhere.txt: no such path"),
        ({"calibration": ()}, "calibration: 0 given; allowed: 1 or more"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(options: ConvertOptions, change: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        convert(replace(options, **change))
    assert list(options.out.parent.iterdir()) == []


def test_folders_that_are_no_dense_model(options: ConvertOptions, tmp_path: Path, tiny_layerwise_checkpoint: Path):
    empty, foreign = tmp_path / "empty", tmp_path / "foreign"
    for folder in (empty, foreign):
        folder.mkdir()
    (foreign / "config.json").write_text("[1]")
    for model, reason in (
        (empty, "it has no config.json"),
        (foreign, "is not a JSON object"),
        (tiny_layerwise_checkpoint, "is a pregate checkpoint already"),
    ):
        with pytest.raises(UserError, match=f"model .*{reason}"):
            convert(replace(options, model=model))


def test_damaged_weights_are_refused(options: ConvertOptions, tmp_path: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in options.model.iterdir():
        content = path.read_bytes()
        (broken / path.name).write_bytes(content[:1000] if path.suffix == ".safetensors" else content)
    with pytest.raises(UserError, match=r"model .*its weights cannot be loaded"):
        convert(replace(options, model=broken))
    assert not options.out.exists()


def test_an_output_that_exists_is_left_alone(options: ConvertOptions):
    options.out.mkdir()
    with pytest.raises(UserError, match=r"out .*exists already"):
        convert(options)
    assert list(options.out.iterdir()) == []


def test_an_ffn_that_is_not_gated_is_refused_by_name(options: ConvertOptions, tmp_path: Path):
    model = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=512)).save_pretrained(model)
    with pytest.raises(UserError, match=r"has no gated FFN \(mlp is a GPT2MLP\)"):
        convert(replace(options, model=model))


def test_width_172_is_refused_with_its_divisors(options: ConvertOptions, shared_folder: Path):
    with pytest.raises(UserError, match=r"experts 8: does not divide the FFN width 172 .* 1, 2, 4, 43, 86"):
        convert(replace(options, model=shared_folder / "models" / "stories260K", shared=3, active=3))


def test_config_names_every_layer(tiny_layerwise_checkpoint: Path):
    config = json.loads((tiny_layerwise_checkpoint / "config.json").read_text())
    assert config["model_type"] == "pregate"
    assert config["layer_cuts"] == [{"num_routed": 6, "num_shared": 2, "num_active": 2, "expert_width": 16}] * 3
    assert (config["routing"], config["gate"], config["path_router"]) == ("layerwise", "linear", None)
