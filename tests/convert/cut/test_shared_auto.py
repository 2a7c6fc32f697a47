"""`--shared auto`: every layer gets its own number of shared experts, and all that follows takes it as it is.

The parent is made so that its layers differ. In layer 1 neurons come in eight groups of one direction each, which fire
together for half of the tokens: whole experts to route. In layer 2 as many neurons as two experts hold are loud.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pregate.cli.main import main
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.files.partial import partial_folder
from pregate.convert.measure.controls import AllPolicy
from pregate.convert.measure.evaluate import EvaluateOptions, evaluate
from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.model import CheckpointReader, RoutedForCausalLM
from pregate.model.checkpoint import read_manifest
from tests.convert.interruption import StopsAfter, interrupt
from tests.equality import reference_texts
from tests.router.serving import engine_in_process, hold

NUM_SHARED = [3, 0, 2]


@pytest.fixture(scope="module")
def uneven_dense(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uneven") / "dense"
    model = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32)
    with torch.no_grad():
        gate_ID = model.model.layers[1].mlp.gate_proj.weight
        gate_ID.copy_(3 * gate_ID[::16].repeat_interleave(16, dim=0))
        model.model.layers[2].mlp.down_proj.weight[:, 40:72] *= 6
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_dense).save_pretrained(path)
    return path


def _arguments(model: Path, text: Path, out: Path) -> list[str]:
    arguments = ["convert", "--model", model, "--experts", 8, "--shared", "auto", "--active", 4, "--samples", 8]
    return [str(a) for a in [*arguments, "--sequence-length", 64, "--calibration", text, "--out", out]]


@pytest.fixture(scope="module")
def converted(uneven_dense: Path, tiny_text: Path) -> Path:
    """Converted by the command line."""
    out = uneven_dense.parent / "layerwise"
    assert main(_arguments(uneven_dense, tiny_text, out)) == 0
    return out


@pytest.fixture(scope="module")
def decoupled(converted: Path, tiny_text: Path) -> Path:
    out = converted.parent / "path"
    decouple(DecoupleOptions(converted, out, (tiny_text,), steps=5, dim=16))
    return out


def _options(model: Path, text: Path, out: Path, shared: int | None, active: int) -> ConvertOptions:
    return ConvertOptions(model, out, 8, shared, active, (text,), samples=8, sequence_length=64)


def _load(path: Path) -> RoutedForCausalLM:
    return RoutedForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_layers_get_different_numbers(converted: Path):
    expected = [
        {"num_routed": 8 - shared, "num_shared": shared, "num_active": 4 - shared, "expert_width": 16}
        for shared in NUM_SHARED
    ]
    assert json.loads((converted / "config.json").read_text())["layer_cuts"] == expected
    assert read_manifest(converted).options["shared"] is None
    assert read_manifest(converted).figures["shared_experts"] == " ".join(map(str, NUM_SHARED))  # printed, too


def test_a_layer_is_cut_as_with_its_number_given(converted: Path, uneven_dense: Path, tiny_text: Path, tmp_path: Path):
    """Layer 0, whose inputs no cut before it has changed: bit for bit."""
    shared = NUM_SHARED[0]
    options = _options(uneven_dense, tiny_text, tmp_path / "out", shared, 4 - shared)
    interrupt(options, 1)
    shard = "model-00001-of-00004.safetensors"
    assert (partial_folder(options.out) / "checkpoint" / shard).read_bytes() == (converted / shard).read_bytes()


def test_interrupted_twice_it_gives_the_same(converted: Path, uneven_dense: Path, tiny_text: Path, tmp_path: Path):
    options = _options(uneven_dense, tiny_text, tmp_path / "out", None, 4)
    interrupt(options, 1)
    interrupt(options, 3)
    progress = StopsAfter(-1)
    manifest = convert(options, progress)
    assert progress.steps == [3]
    names = {path.name for path in converted.iterdir()}
    assert {path.name for path in options.out.iterdir()} == names
    for name in names - {"manifest.json"}:  # it names --out
        assert (options.out / name).read_bytes() == (converted / name).read_bytes(), name
    assert manifest.figures == read_manifest(converted).figures


@torch.no_grad()
def test_with_all_experts_on_it_is_the_dense_model(converted: Path, uneven_dense: Path):
    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(uneven_dense).eval()(ids).logits
    routed = _load(converted)
    assert (routed(ids).logits - expected).abs().max() > 0.1  # it does route
    routed.routing_policy = AllPolicy()
    assert (routed(ids).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["layerwise", "path"])
def test_controls_run_at_its_active_share(request: pytest.FixtureRequest, kind: str, tiny_text: Path):
    """Four of eight experts in every layer, however many of them are shared."""
    path = request.getfixturevalue("converted" if kind == "layerwise" else "decoupled")
    result = evaluate(EvaluateOptions(path, (tiny_text,), 120, controls=True))
    table = result["controls"]
    own = "linear gate" if kind == "layerwise" else "path router"
    assert table[own]["perplexity"] == result["perplexity"]
    for name in ("static mask", "random routing", "paper's gate", "oracle, fixed number"):
        assert table[name]["active_share"] == 0.5, name
        assert table[name]["ratio_to_dense"] != 1, name


def test_decoupled_its_paths_fit_every_layer(decoupled: Path):
    cuts = CheckpointReader(decoupled).config.cuts
    assert [cut.num_shared for cut in cuts] == NUM_SHARED
    paths = _load(decoupled).paths([1, *range(20, 60)])
    paths.check(cuts)
    assert [len(np.unique(ids)) > 1 for ids in paths.ids.swapaxes(0, 1)] == [True] * 3


@pytest.mark.parametrize("kind", ["layerwise", "path"])
def test_served_by_two_hosts_it_equals_the_reference(request: pytest.FixtureRequest, kind: str):
    path = request.getfixturevalue("converted" if kind == "layerwise" else "decoupled")
    model = _load(path)
    rng = np.random.default_rng(3)
    prompts = [[1, *rng.integers(3, 512, size=n).tolist()] for n in (5, 17, 30)]
    references = reference_texts(model, prompts, 8)
    with engine_in_process(path, 2) as engine:
        hold(engine, kind, references, together=(True,))
        assert all(client.stats.groups > 0 for client in engine.exchange.clients)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--shared", "many"], "--shared many: allowed: a whole number, 0 or more, or auto"),
        (["--shared", "-1"], "--shared -1: allowed: 0 or more, or auto"),
        (["--active", "0"], "--active 0: allowed with --shared auto: 1 to 8"),
        (["--active", "9"], "--active 9: allowed with --shared auto: 1 to 8"),
        (
            ["--clustering", "marks", "--shared-by", "rate"],
            "--shared auto: allowed with --clustering marks: a number",
        ),
    ],
)
def test_bad_values(change: list[str], sentence: str, tiny_dense: Path, tiny_text: Path, tmp_path: Path, capsys):
    assert main([*_arguments(tiny_dense, tiny_text, tmp_path / "out"), *change]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
