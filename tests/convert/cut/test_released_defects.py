"""The notes on CMoE list what broke in the released code (section 5.1); one test a row that ours does not have it.

Where a row is held in depth elsewhere, this names it and looks once.
"""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pregate.base.errors import UserError
from pregate.cli.main import main
from pregate.convert.cut import layer_pass
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.layer_cut import cut_one
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.files.streamed import load_any
from pregate.convert.text.calibration import read_calibration
from pregate.kernels import reference
from pregate.model import CheckpointReader, RoutedForCausalLM
from pregate.model.checkpoint import read_manifest
from pregate.model.folder import read_folder
from pregate.model.gated_mlp import find_gated_mlps
from pregate.model.gates import RepresentativeGate
from tests.equality import reference_texts
from tests.router.serving import engine_in_process, hold


def _options(model: Path, text: Path, out: Path, **method: Any) -> ConvertOptions:
    """CMoE's own recipe on few short windows, S2A2E8; five of them, no multiple of its batch of eight."""
    fields = {"model": model, "out": out, "experts": 8, "shared": 2, "active": 2, "calibration": (text,)}
    return ConvertOptions(recipe="cmoe-paper", **({"samples": 5, "sequence_length": 64} | method), **fields)


@pytest.fixture
def options(tiny_dense: Path, tiny_text: Path, tmp_path: Path) -> ConvertOptions:
    return _options(tiny_dense, tiny_text, tmp_path / "out")


@pytest.fixture(scope="module")
def converted(tiny_dense: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("defects") / "converted"
    convert(_options(tiny_dense, tiny_text, out))
    return out


@pytest.fixture(scope="module")
def moved(converted: Path) -> Path:
    """The checkpoint as training would leave it: routing biases and scales that are not 0."""
    model = _load(converted)
    generator = torch.Generator().manual_seed(4)
    for gate in _gates(model):
        gate.balance_bias.copy_(0.3 * torch.randn(6, generator=generator))
        gate.scale.data.copy_(torch.randn(6, generator=generator))
    model.save_pretrained(converted.parent / "moved")
    AutoTokenizer.from_pretrained(converted).save_pretrained(converted.parent / "moved")
    return converted.parent / "moved"


def _load(path: Path) -> RoutedForCausalLM:
    return RoutedForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _gates(model: RoutedForCausalLM) -> list[RepresentativeGate]:
    gates = [mlp.gate for mlp in model.routed_mlps]
    assert all(isinstance(gate, RepresentativeGate) for gate in gates)
    return gates  # pyright: ignore[reportReturnType]


def test_cuda_is_not_hard_coded(options: ConvertOptions, monkeypatch: pytest.MonkeyPatch):
    def forbidden(*_: Any) -> None:
        raise AssertionError("CUDA was asked for")

    monkeypatch.setattr(torch.cuda, "_lazy_init", forbidden)
    with pytest.raises(AssertionError, match="CUDA was asked for"):
        torch.zeros(1).cuda()
    convert(replace(options, device="cpu"))
    _load(options.out).generate(torch.tensor([[1, 5, 9]]), max_new_tokens=2, pad_token_id=0)


def test_training_free_mode_works_and_fine_tuning_never_runs_by_itself(converted: Path, tiny_dense: Path):
    """What comes out of a conversion is the parent's own weights, regrouped; no gate was trained."""
    dense: Any = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32)
    model = _load(converted)
    for parent, routed in zip(find_gated_mlps(dense), model.routed_mlps, strict=True):
        gate_up, down = routed.dense_weights()
        gate, up = gate_up.chunk(2)
        rows = routed.neuron_index.long()
        assert torch.equal(gate, parent.gate[rows])
        assert torch.equal(up, parent.up[rows])
        assert torch.equal(down, parent.down[:, rows])
    for gate in _gates(model):
        assert not gate.scale.any()
        assert not gate.balance_bias.any()
    theirs = {n: p for n, p in dense.named_parameters() if ".mlp." not in n}
    assert len(theirs) > 10
    assert all(torch.equal(model.get_parameter(f"parent.{name}"), p) for name, p in theirs.items())


@pytest.mark.parametrize("samples", [1, 7, 9])
def test_any_number_of_samples(options: ConvertOptions, samples: int):
    manifest = convert(replace(options, samples=samples, sequence_length=24))
    assert manifest.calibration["num_windows"] == samples
    assert manifest.figures["routed_perplexity"] > 1


def test_calibration_text_is_any_number_of_files_of_either_kind(options: ConvertOptions, tmp_path: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    sentence = "A boy ran along the quay with a basket of bread, calling to his sister. "
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": sentence * 3}) for _ in range(6)))
    (folder / "b.txt").write_text(sentence * 40)
    alone = tmp_path / "c.txt"
    alone.write_text("The night came down, the lamps were lighted, and the sea forgot the word. " * 20)
    manifest = convert(replace(options, calibration=(folder, alone), draw="documents", sequence_length=32))
    assert sorted(Path(name).name for name in manifest.calibration["files"]) == ["a.jsonl", "b.txt", "c.txt"]


@torch.no_grad()
def test_attention_is_not_called_by_hand(converted: Path, tiny_dense: Path, tiny_text: Path):
    """The layers run under this transformers, whose attention takes `position_embeddings`, as in its own forward."""
    assert tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 48)
    dense: Any = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32).eval()
    text = read_calibration((tiny_text,), AutoTokenizer.from_pretrained(tiny_dense), 5, 64, 0, "stream")
    ids = torch.tensor(text.held_back)
    assert ids.numel() > 60
    loss = dense(ids, labels=ids).loss.item()
    assert read_manifest(converted).figures["dense_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize("experts", [12, 7, 256])
def test_a_width_that_is_not_divisible_drops_nothing(options: ConvertOptions, experts: int):
    divisors = "allowed: 1, 2, 4, 8, 16, 32, 64, 128"
    with pytest.raises(UserError, match=f"experts {experts}: does not divide the FFN width 128 .*{divisors}"):
        convert(replace(options, experts=experts))
    assert list(options.out.parent.iterdir()) == []


def test_every_neuron_is_kept_where_it_is_divisible(converted: Path):
    for mlp in _load(converted).routed_mlps:
        assert sorted(mlp.neuron_index.tolist()) == list(range(128))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"active": 7}, "active 7: with shared 2 it exceeds experts 8; allowed: 0 to 6"),
        ({"shared": 8, "active": 0}, "shared 8: allowed: 0 to 7"),
        ({"marks_per_token": 129}, "marks_per_token 129: allowed: 1 to 128, the FFN width"),
    ],
)
def test_top_k_out_of_range_has_a_message(options: ConvertOptions, change: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        convert(replace(options, **change))


@pytest.mark.parametrize("change", [{"shared": 0, "active": 4}, {"shared": 3, "active": 0}, {"marks_per_token": 128}])
def test_the_ends_of_the_ranges_run(options: ConvertOptions, change: dict, monkeypatch: pytest.MonkeyPatch):
    options = replace(options, sequence_length=24, **change)
    convert(options)
    model = _load(options.out)
    active: list[list[int]] = []
    add_routed = reference.add_routed

    def watched(out_TD: torch.Tensor, x_TD: torch.Tensor, ids_TK: torch.Tensor, *rest: Any) -> torch.Tensor:
        active.append([len({e for e in row if e >= 0}) for row in ids_TK.tolist()])
        return add_routed(out_TD, x_TD, ids_TK, *rest)

    monkeypatch.setattr(reference, "add_routed", watched)
    assert torch.isfinite(model(torch.tensor([[1, 7, 9]])).logits).all()
    assert active == [[options.active] * 3] * 3
    assert [mlp.shared is not None for mlp in model.routed_mlps] == [options.shared != 0] * 3


def test_saved_and_loaded_it_has_the_same_ffns(converted: Path, tmp_path: Path):
    first = _load(converted)
    first.save_pretrained(tmp_path / "again")
    second: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert type(second) is RoutedForCausalLM
    state = second.state_dict()
    assert {name for name in state if ".experts." in name}
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())


def test_it_cannot_be_mistaken_for_a_plain_llama(converted: Path, tiny_dense: Path):
    """Config and names say what it is: forced into a Llama, no single weight fits, and the report says so."""
    fields = json.loads((converted / "config.json").read_text())
    assert (fields["model_type"], fields["architectures"]) == ("pregate", ["RoutedForCausalLM"])
    config = transformers.LlamaConfig.from_pretrained(tiny_dense)
    forced: Any = LlamaForCausalLM.from_pretrained(converted, config=config, output_loading_info=True)
    model, report = forced
    assert set(report["missing_keys"]) == {name for name, _ in model.named_parameters()}


def test_without_pregate_transformers_refuses_it(converted: Path):
    script = (
        "import sys, transformers\n"
        "try:\n"
        "    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except ValueError as error:\n"
        "    assert 'pregate' not in sys.modules\n"
        "    sys.exit(f'refused: {error}')\n"
    )
    command = [sys.executable, "-I", "-c", script, str(converted)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    assert "refused: " in run.stderr
    assert "`pregate`" in run.stderr


def test_the_routing_bias_is_state_and_decides(moved: Path, tmp_path: Path):
    model = _load(moved)
    gate = _gates(model)[1]
    name = next(n for n in model.state_dict() if n.endswith("layers.1.mlp.paper_gate.balance_bias"))
    assert gate.balance_bias.abs().sum() > 0.1
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(_load(tmp_path / "again").state_dict()[name], gate.balance_bias)
    bf16 = RoutedForCausalLM.from_pretrained(moved, dtype=torch.bfloat16)
    assert torch.equal(bf16.state_dict()[name], gate.balance_bias)  # a gate stays as it is
    assert model.double().state_dict()[name].dtype == torch.float64  # and goes where the model goes
    model.float()
    x_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    with_bias = gate.choose(x_TD).ids
    gate.balance_bias.zero_()
    assert not torch.equal(with_bias, gate.choose(x_TD).ids)


def test_the_router_scale_learns(converted: Path, tmp_path: Path):
    """From 0, where a conversion leaves it: a gradient reaches it, a step moves it, and saving keeps it."""
    model = _load(converted).train()
    gates = _gates(model)
    assert all(gate.scale.requires_grad and not gate.scale.any() for gate in gates)
    assert all(any(gate.scale is p for p in model.parameters()) for gate in gates)
    optimiser = torch.optim.SGD([gate.scale for gate in gates], lr=10.0)
    ids = torch.tensor([[1, *range(20, 60)]])
    before = model(ids, labels=ids, use_cache=False)
    before.loss.backward()
    assert all(gate.scale.grad is not None and gate.scale.grad.any() for gate in gates)
    optimiser.step()
    with torch.no_grad():
        assert (model(ids, use_cache=False).logits - before.logits).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "tuned")
    for ours, theirs in zip(gates, _gates(_load(tmp_path / "tuned")), strict=True):
        assert ours.scale.any()
        assert torch.equal(ours.scale, theirs.scale)


def test_bias_and_scale_are_used_by_the_reference_model_and_when_served(moved: Path, converted: Path):
    model = _load(moved)
    rng = np.random.default_rng(3)
    prompts = [[1, *rng.integers(3, 512, size=n).tolist()] for n in (5, 17, 30)]
    references = reference_texts(model, prompts, 12)
    with engine_in_process(moved, 2) as engine:
        hold(engine, "two hosts", references)
        assert all(client.stats.groups > 0 for client in engine.exchange.clients)
    _the_comparison_sees_both(model, references, prompts)


def _the_comparison_sees_both(model: RoutedForCausalLM, references: list, prompts: list[list[int]]) -> None:
    """Without the scales, or without the biases, the logits would be others: what was served had them."""
    for forget in ("scale", "balance_bias"):
        kept = [getattr(gate, forget).detach().clone() for gate in _gates(model)]
        for gate in _gates(model):
            getattr(gate, forget).data.zero_()
        with torch.no_grad():
            logits = model(torch.tensor([prompts[1]]), use_cache=False).logits[0, -1]
        assert (logits - references[1].logits[0]).abs().max() > 1e-2
        for gate, values in zip(_gates(model), kept, strict=True):
            getattr(gate, forget).data.copy_(values)


def test_nothing_is_downloaded(options: ConvertOptions, monkeypatch: pytest.MonkeyPatch):
    def blocked(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the network was asked for")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    with pytest.raises(AssertionError, match="the network"):
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    convert(options)
    assert main(["evaluate", "--model", str(options.out), "--text", str(options.calibration[0]), "--json"]) == 0


def test_no_more_activations_are_kept_than_are_profiled(options: ConvertOptions, monkeypatch: pytest.MonkeyPatch):
    """One layer's at a time, for the windows asked for; tests/convert/cut/test_streaming.py measures all memory."""
    rows: list[int] = []
    alive: weakref.WeakSet = weakref.WeakSet()

    def watched(mlp: Any, x_TD: torch.Tensor, *rest: Any) -> Any:
        storage = x_TD.untyped_storage()
        assert not list(alive)  # those of the layer before are gone
        assert storage.nbytes() == x_TD.numel() * 4
        alive.add(x_TD)
        rows.append(len(x_TD))
        return cut_one(mlp, x_TD, *rest)

    monkeypatch.setattr(layer_pass, "cut_one", watched)
    convert(options)
    assert rows == [5 * 64] * 3


def test_evaluating_needs_no_other_harness(converted: Path, tiny_text: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    for name in ("lm_eval", "datasets", "evaluate", "peft", "accelerate", "lap"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = ["evaluate", "--model", str(converted), "--text", str(tiny_text), "--max-tokens", "60", "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_tokens"] == 60
    assert result["perplexity"] > 1


def test_bf16_is_only_how_it_is_stored(options: ConvertOptions, monkeypatch: pytest.MonkeyPatch):
    """A CPU may have no bf16 arithmetic: conversion and scoring compute in float32 whatever is stored."""
    seen: set[torch.dtype] = set()

    def watched(mlp: Any, x_TD: torch.Tensor, *rest: Any) -> Any:
        seen.update(t.dtype for t in (x_TD, mlp.gate, mlp.up, mlp.down))
        return cut_one(mlp, x_TD, *rest)

    monkeypatch.setattr(layer_pass, "cut_one", watched)
    convert(replace(options, dtype="bfloat16"))
    assert seen == {torch.float32}
    assert CheckpointReader(options.out).read_unit(0, 0)[0].dtype == torch.bfloat16
    assert {p.dtype for p in load_any(read_folder(options.out)).parameters()} == {torch.float32}
