from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from pregate.base.errors import UserError
from pregate.cluster.routed_experts import read_routed_experts
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.convert.paths.targets import collect_targets
from pregate.convert.progress import QUIET
from pregate.model import CheckpointReader, RoutedForCausalLM
from pregate.model.checkpoint import read_manifest, write_manifest
from pregate.model.layers import weighted_mass
from pregate.model.read_check import Hashes


@pytest.fixture
def options(tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> DecoupleOptions:
    return DecoupleOptions(tiny_layerwise_checkpoint, tmp_path / "out", (tiny_text,), steps=5, dim=16)


def test_training_beats_chance_clearly(options: DecoupleOptions):
    """Chance: 2 of 6 experts agree with the oracle's in a third of the picks."""
    figures = decouple(replace(options, steps=120, dim=32)).figures["decouple"]
    assert figures["loss_last"] < 0.7 * figures["loss_first"]
    assert figures["path_vs_oracle"]["mean_overlap"] > 0.45


@torch.no_grad()
def test_the_checkpoint_is_exact_and_the_rest_of_the_model_unchanged(
    options: DecoupleOptions, tiny_layerwise_checkpoint: Path
):
    manifest = decouple(options)
    reader = CheckpointReader(options.out, hashes=Hashes.FIRST)
    assert (reader.config.routing, reader.config.has_path_router) == ("path", True)
    assert manifest == reader.manifest
    assert manifest.method == "cmoe+decouple"
    assert {path.stat().st_mode & 0o777 for path in options.out.iterdir()} == {0o644}  # weights as readable as config
    assert manifest.options["experts"] == 8  # what the layer-wise manifest said is kept
    assert manifest.calibration["decouple"]["num_documents"] > 2
    before = RoutedForCausalLM.from_pretrained(tiny_layerwise_checkpoint).state_dict()
    model = RoutedForCausalLM.from_pretrained(options.out).eval()
    after = model.state_dict()
    assert {n for n in after if n not in before} == {n for n in after if n.startswith("path_router.")}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    ids = AutoTokenizer.from_pretrained(options.out)("The harbour lay quiet")["input_ids"]
    paths = model.paths(ids)
    paths.check(reader.config.cuts)
    assert paths.exact
    assert paths.ids.shape == (len(ids), 3, 6)  # as many as score high enough, up to all


def test_two_runs_train_the_same_router(options: DecoupleOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pregate.convert.files.assembly.MOST_IN_ONE", 0)  # layers and router lie in files of their own
    first, again = decouple(options), decouple(replace(options, out=tmp_path / "again"))
    other = decouple(replace(options, out=tmp_path / "other", seed=1))
    *layers, router = sorted(name for name in first.files if name.endswith(".safetensors"))
    assert first.files[router] == again.files[router] != other.files[router]
    source = read_manifest(options.model)
    assert [first.files[name] for name in layers] == [source.files[n] for n in sorted(source.files) if "model-" in n]


def test_weights_stay_in_their_type_and_the_router_in_float32(
    tiny_dense: Path, tiny_text: Path, options: DecoupleOptions, tmp_path: Path
):
    half = tmp_path / "half"
    convert(ConvertOptions(tiny_dense, half, 8, 2, 2, (tiny_text,), samples=2, sequence_length=32, dtype="float16"))
    decouple(replace(options, model=half))
    assert CheckpointReader(options.out).read_unit(1, 0)[1].dtype == torch.float16
    model = RoutedForCausalLM.from_pretrained(options.out)
    assert model.path_router is not None
    assert model.path_router.heads.weight.dtype == torch.float32


@torch.no_grad()
def test_targets_are_the_masses_along_the_routed_model(tiny_layerwise_checkpoint: Path):
    model = RoutedForCausalLM.from_pretrained(tiny_layerwise_checkpoint, dtype=torch.float32).eval()
    rows = [[1, 7, 9, 11, 13], [1, 44]]
    pool = collect_targets(model, rows, QUIET)
    assert [m.shape for m in pool.mass] == [(5, 18), (2, 18)]
    seen: list[torch.Tensor] = []

    def see(mlp: Any, args: tuple[torch.Tensor]) -> None:
        seen.append(weighted_mass(mlp, args[0].reshape(-1, 64)))

    for mlp in model.routed_mlps:
        mlp.register_forward_pre_hook(see)
    model(torch.tensor(rows[:1]), use_cache=False)
    torch.testing.assert_close(pool.mass[0], torch.cat(seen, dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": "recurrent", "window": 8, "blocks": 2},
        {"target": "paper", "embedding": "parent"},
        {"target": "captured", "weights": "learned"},
        {"target": "relative"},
        {"target": "sets"},
        {"gate": "dselect", "heads": "recurrent"},
    ],
    ids=str,
)
def test_routers_of_every_option_learn_and_are_written(options: DecoupleOptions, change: dict[str, Any]):
    """Chance: 2 of 6 experts agree with the oracle's in a third of the picks."""
    figures = decouple(replace(options, steps=40, dim=32, **change)).figures["decouple"]
    assert figures["loss_last"] < figures["loss_first"]
    assert figures["path_vs_oracle"]["mean_overlap"] > 0.38
    assert len(figures["path_vs_oracle"]["same_set_by_layer"]) == 3
    use = read_routed_experts(str(options.out)).load_LR
    assert use is not None and use.sum(axis=1) == pytest.approx([2] * 3, abs=0.5), "about two of six a token"
    model = RoutedForCausalLM.from_pretrained(options.out)
    shape = model.config.router_shape
    assert all(getattr(shape, name) == value for name, value in change.items() if name in ("heads", "gate", "weights"))
    assert model.paths([1, 5, 9]).weights is None


def test_one_index_for_all_layers(options: DecoupleOptions):
    decouple(replace(options, heads="single"))
    ids = RoutedForCausalLM.from_pretrained(options.out).paths(list(range(40))).ids
    assert (ids == ids[:, :1]).all()


def test_a_costly_router_is_warned_of(options: DecoupleOptions, tmp_path: Path):
    """The tiny dense model multiplies by 143,808 parameters per token; even the smallest router is 1 % of that."""
    figures = decouple(options).figures["decouple"]
    assert figures["router_flops_per_token"] == 24 * 16**2 + 4 * 64 * 16 + 2 * 16 * 18
    dense = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 512 * 64 + 7 * 64
    assert figures["router_flops_share"] == pytest.approx(figures["router_flops_per_token"] / (2 * dense), abs=1e-5)
    assert "more than 1%" in figures["warning"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 0}, "steps 0: allowed: 1 or more"),
        ({"dim": 30}, "dim 30: allowed: multiples of 4"),
        ({"blocks": 0}, "blocks 0: allowed: 1 or more"),
        ({"window": 0}, "window 0: allowed: 1 or more"),
        ({"heads": "double"}, "heads double: allowed: independent, recurrent, single"),
        ({"target": "loss"}, "target loss: allowed: mass, relative, sets, paper, captured"),
        ({"embedding": "tied"}, "embedding tied: allowed: own, parent"),
        ({"gate": "dselect", "target": "mass"}, "target mass: allowed with gate dselect: captured"),
        ({"text": ()}, "text: 0 given; allowed: 1 or more"),
        ({"text": (Path("/nowhere"),)}, "text /nowhere: no such path"),
        ({"model": Path("/nowhere")}, "model /nowhere: no such path"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(options: DecoupleOptions, change: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        decouple(replace(options, **change))
    assert list(options.out.parent.iterdir()) == []


def test_models_that_cannot_be_decoupled(
    options: DecoupleOptions, tiny_dense: Path, tiny_path_checkpoint: Path, tiny_text: Path, tmp_path: Path
):
    static = tmp_path / "static"
    convert(ConvertOptions(tiny_dense, static, 8, 4, 0, (tiny_text,), samples=2, sequence_length=32))
    for model, reason in (
        (tiny_dense, "is a dense model; convert it first"),
        (tiny_path_checkpoint, "already decoupled"),
        (static, "there is nothing to route"),
    ):
        with pytest.raises(UserError, match=f"model .*{reason}"):
            decouple(replace(options, model=model))
    assert not options.out.exists()


def test_a_gate_that_weighs_its_experts_is_refused(
    options: DecoupleOptions, tiny_dense: Path, tiny_text: Path, tmp_path: Path
):
    method = {"gate": "representative", "selection": "top_k", "samples": 2, "sequence_length": 32}
    convert(ConvertOptions(tiny_dense, tmp_path / "paper", 8, 2, 2, (tiny_text,), **method))
    model = RoutedForCausalLM.from_pretrained(tmp_path / "paper")
    gate = model.routed_mlps[1].paper_gate
    assert gate is not None
    gate.scale.data += 0.5
    model.save_pretrained(tmp_path / "learned")
    AutoTokenizer.from_pretrained(tiny_dense).save_pretrained(tmp_path / "learned")
    write_manifest(tmp_path / "learned", read_manifest(tmp_path / "paper"))
    for weights in ("one", "learned"):  # a scale of its own begins at 0, whatever the gate's is
        with pytest.raises(UserError, match=r"layer 1's gate weighs its experts .* does not learn its weights"):
            decouple(replace(options, model=tmp_path / "learned", weights=weights))
    decouple(replace(options, model=tmp_path / "learned", predict=True))
