"""The notes on Read-ME list what breaks in its released code (section 5, items 1 to 8); each item is looked at here.

Held elsewhere in depth, and only looked at here with Read-ME's one-index router: chunks, batch mates and causality of
paths in tests/model/test_path_router.py; padded batches, and that `generate` follows teacher forcing, in
tests/model/test_modeling.py; damaged and incomplete checkpoints in tests/model/test_checkpoint.py; served equality and
resuming in tests/convert/domains/test_run.py.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from pregate.cli.main import main
from pregate.cli.read_me import read_me as command
from pregate.convert.domains import rounds as read_me_rounds
from pregate.convert.domains.options import ReadMeOptions
from pregate.convert.domains.run import read_me
from pregate.convert.measure.scoring import score_rows
from pregate.convert.paths.parent_embedding import start_from
from pregate.model import CheckpointReader, RoutedForCausalLM
from pregate.model.checkpoint import read_manifest
from pregate.model.layers import PathPolicy
from pregate.model.path_router import PathRouter
from tests.convert.domains.read_me_cases import load, small

IDS = [1, *range(30, 70)]


@pytest.fixture(scope="module")
def cut(tiny_dense: Path, domains: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("defects") / "cut"
    read_me(small(tiny_dense, out, domains, steps=0, router_steps=30, router_learning_rate=5e-3))
    return out


@pytest.fixture
def options(tiny_dense: Path, domains: tuple[Path, ...], tmp_path: Path) -> ReadMeOptions:
    return small(tiny_dense, tmp_path / "out", domains)


# ---- 1, 2: what the scripts need before they do anything ----


def test_one_plain_process_is_enough(options: ReadMeOptions, monkeypatch: pytest.MonkeyPatch):
    """The command from text to checkpoint: no distributed wrapper, whose names it would wait for, and no other tool."""
    for name in ("accelerate", "deepspeed", "datasets", "evaluate", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = ["read-me", "--model", options.model, "--out", options.out, "--domain", *options.domains]
    arguments += ["--rounds", "1", "--router-steps", "2", "--steps", "1", "--router-batch", "1", "--batch", "1"]
    arguments += ["--samples", "2", "--sequence-length", "24", "--pool-tokens", "200", "--dim", "8"]
    assert main([str(a) for a in arguments]) == 0
    assert not torch.distributed.is_initialized()
    assert read_manifest(options.out).method == "read-me+tune"
    assert not any("module." in name for name in load(options.out).state_dict())


def test_every_argument_is_defined_and_reaches_the_run():
    """The command's parameters are the options' fields, and nothing else; their defaults are the class's own."""
    parameters = inspect.signature(command).parameters.values()
    assert {p.name for p in parameters} == {"domain" if f.name == "domains" else f.name for f in fields(ReadMeOptions)}
    assert not [p.name for p in parameters if p.default not in (None, inspect.Parameter.empty)]


# ---- 3: schedule, rounds, names ----


def test_rates_fall_by_a_cosine_within_and_by_the_decay_across_rounds(
    options: ReadMeOptions, monkeypatch: pytest.MonkeyPatch
):
    rates: dict[str, list[float]] = {"router": [], "experts": []}
    step = torch.optim.AdamW.step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        group = self.param_groups[0]
        assert all(g["weight_decay"] in (0.01, 0.0) for g in self.param_groups)
        kind = "router" if any(p.shape[0] == 512 and p.shape[1:] == (16,) for p in group["params"]) else "experts"
        rates[kind].append(group["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    read_me(replace(options, rounds=3, router_steps=4, steps=2))
    cosine = [0.5 * (1 + np.cos(np.pi * i / 4)) for i in range(4)]
    expected = [5e-4 * 0.8**r * share for r in range(3) for share in cosine]
    assert rates["router"] == pytest.approx(expected)
    assert rates["experts"] == pytest.approx([5e-5 * 0.8**r * share for r in range(3) for share in (1.0, 0.5)])


def test_as_many_rounds_as_asked_each_after_the_last(options: ReadMeOptions, monkeypatch: pytest.MonkeyPatch):
    """Numbered 1, 2, 3; each begins with what the one before left, and no name of a folder matters."""
    assert "llama" not in str(options.model).lower()
    states: list[tuple[torch.Tensor, torch.Tensor]] = []
    run_stage = read_me_rounds.Rounds.run_stage

    def watched(self: read_me_rounds.Rounds, index: int, progress: Any) -> None:
        before = _state(self.model)
        run_stage(self, index, progress)
        states.append((before, _state(self.model)))

    monkeypatch.setattr(read_me_rounds.Rounds, "run_stage", watched)
    figures = read_me(replace(options, rounds=3, learning_rate=1e-3)).figures
    assert [(r["round"], r["stage"]) for r in figures["rounds"]] == [
        (n, stage) for n in (1, 2, 3) for stage in ("router", "experts")
    ]
    assert len(states) == 6
    for (before, after), (following, _) in pairwise(states):
        assert not torch.equal(before, after)
        assert torch.equal(after, following)
    assert torch.equal(states[-1][1], _state(load(options.out)))


def _state(model: RoutedForCausalLM) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in sorted(model.named_parameters())])


def test_the_defaults_are_the_papers():
    default = {f.name: f.default for f in fields(ReadMeOptions)}
    names = ("rounds", "router_steps", "steps", "router_learning_rate", "learning_rate", "decay", "weight_decay")
    assert [default[n] for n in names] == [8, 100, 200, 5e-4, 5e-5, 0.8, 0.01]
    assert [default[n] for n in ("active_share", "samples", "sequence_length")] == [0.5, 16, 4096]
    assert [default[n] for n in ("router_batch", "batch", "dim", "blocks")] == [64, 128, 512, 1]


# ---- 4: reloading ----


def test_the_routers_embedding_is_a_copy(cut: Path, tiny_dense: Path, tmp_path: Path):
    """The released router's is a view of the base model's: loading writes it over the base model's first columns."""
    dense: Any = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32)
    router = PathRouter(RoutedForCausalLM.from_pretrained(cut).config.router_shape, 512, load(cut).config.cuts)
    parent = dense.get_input_embeddings().weight
    before = parent.detach().clone()
    start_from(router, parent)
    router.embedding.weight.data.add_(1.0)
    assert torch.equal(parent, before)
    model: Any = load(cut)
    for _ in range(2):
        assert torch.equal(model.get_input_embeddings().weight, before)
        assert torch.equal(model.get_output_embeddings().weight, dense.get_output_embeddings().weight)
        assert model.path_router.embedding.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
        model.save_pretrained(tmp_path / "again")
        model = load(tmp_path / "again")


# ---- 5: a converted checkpoint, its config and its width ----


@pytest.mark.parametrize("permanent", ["fused", "separate"])
def test_a_checkpoint_loads_again_with_the_same_experts(options: ReadMeOptions, tmp_path: Path, permanent: str):
    read_me(replace(options, permanent=permanent, active_share=0.75, learning_rate=1e-3))
    first = load(options.out)
    first.save_pretrained(tmp_path / "again")
    second: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(second) is RoutedForCausalLM
    state = second.state_dict()
    with safe_open(tmp_path / "again" / "model.safetensors", framework="pt") as shard:
        assert set(shard.keys()) == set(state)  # none unexpected, none missing
    assert len([name for name in state if ".experts." in name]) == 6
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())
    written = score_rows(first, [IDS]).nats
    assert score_rows(second, [IDS]).nats == written


def test_the_config_says_that_and_how_it_was_converted(cut: Path):
    said = json.loads((cut / "config.json").read_text())
    assert (said["model_type"], said["routing"], said["path_router"]["heads"]) == ("pregate", "path", "single")
    assert read_manifest(cut).method == "read-me"
    assert read_manifest(cut).options["active_share"] == 0.5


@pytest.mark.parametrize("share", [0.5, 0.3, 0.75])
def test_the_width_is_what_is_declared(options: ReadMeOptions, share: float):
    """Exactly, where the released threshold keeps one channel less."""
    read_me(replace(options, active_share=share, steps=0, router_steps=1))
    width = round(share * 128)
    reader = CheckpointReader(options.out)
    for layer, layer_cut in enumerate(reader.config.cuts):
        gate_up, down = reader.read_unit(layer, 2)
        assert layer_cut.expert_width == width
        assert gate_up.shape == (2 * width, 64)
        assert down.shape == (64, width)
    for mlp in load(options.out).routed_mlps:
        assert all(len(set(neurons)) == width for neurons in mlp.neuron_index.view(3, width).tolist())


# ---- 6, 7: routes that do not depend on how the tokens came ----


def test_generating_takes_the_routes_of_the_whole_text(cut: Path, monkeypatch: pytest.MonkeyPatch):
    """Token by token with a cache, as transformers generates: no flag, and no second look at the prompt."""
    model = load(cut)
    seen: list[np.ndarray] = []
    choose = PathPolicy.choose

    def watched(self: PathPolicy, mlp: Any, x_TD: torch.Tensor) -> Any:
        if mlp.layer == 1:
            seen.append(self.ids_TLK[:, 1, 0].numpy())
        return choose(self, mlp, x_TD)

    monkeypatch.setattr(PathPolicy, "choose", watched)
    settings: dict[str, Any] = {"do_sample": True, "max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(0)
    text = model.generate(torch.tensor([IDS[:9]]), **settings)[0].tolist()
    assert [len(ids) for ids in seen] == [9] + [1] * 39
    whole = model.paths(text).ids[:-1, 1, 0]
    assert np.array_equal(np.concatenate(seen), whole)
    assert len(np.unique(whole[9:])) > 1
    alone = [model.paths([token]).ids[0, 1, 0] for token in text[:-1]]
    assert not np.array_equal(alone, whole)  # from the newest token alone they would be others


def test_a_new_cache_starts_from_nothing(cut: Path):
    """The released third mode reads uninitialised memory; here what ran before leaves no trace."""
    model = load(cut)
    first = model.paths(IDS).ids
    model.paths([5] * 100)
    assert np.array_equal(model.paths(IDS).ids, first)


@torch.no_grad()
def test_left_padding_changes_no_route(cut: Path):
    model = load(cut)
    ids = torch.tensor([[0] * 7 + IDS, [3] * 48])
    mask = torch.tensor([[0] * 7 + [1] * 41, [1] * 48])
    states = [model.path_computer.new_state() for _ in range(2)]
    paths = model.batch_paths(ids, mask, states)[0].ids[0]
    assert (paths[:7] == -1).all()
    assert np.array_equal(paths[7:].numpy(), model.paths(IDS).ids)
    assert len(paths[7:].unique()) > 1
    alone = model(torch.tensor([IDS])).logits[0, -1]
    padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits[0, -1]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_chunked_prefill_gives_the_same_routes(cut: Path, size: int):
    model = load(cut)
    state, parts = model.path_computer.new_state(), []
    for start in range(0, len(IDS), size):
        (paths,), (state,) = model.path_computer.extend([state], [IDS[start : start + size]])
        parts.append(paths.ids)
    assert np.array_equal(np.concatenate(parts), model.paths(IDS).ids)


# ---- 8: the other mode, and the other entry points ----


@torch.no_grad()
def test_separate_experts_run_with_one_index_for_all_tokens(options: ReadMeOptions):
    read_me(replace(options, permanent="separate", active_share=0.75, steps=0))
    model = load(options.out)
    assert any(mlp.shared is not None for mlp in model.routed_mlps)
    logits = []
    for expert in range(3):
        model.routing_policy = PathPolicy(torch.full((len(IDS), 3, 1), expert))
        logits.append(model(torch.tensor([IDS])).logits)
    assert torch.isfinite(torch.stack(logits)).all()
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_the_other_commands_take_the_checkpoint(cut: Path, domains: tuple[Path, ...], capsys: pytest.CaptureFixture):
    text = ["--text", str(domains[0]), "--max-tokens", "60", "--json"]
    assert main(["evaluate", "--model", str(cut), *text]) == 0
    assert json.loads(capsys.readouterr().out)["routing"] == "path"
    assert main(["generate", "--model", str(cut), "--prompt", "O wind", "--max-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completion_tokens"] == 4
    assert main(["route", "--model", str(cut), "--prompt", "O wind", "--json"]) == 0
    routed = json.loads(capsys.readouterr().out)
    assert routed["exact"]
    assert all(len({layer[0] for layer in token}) == 1 for token in routed["paths"])


def test_transformers_is_not_vendored():
    assert Path(transformers.__file__).parent.name == "transformers"
    assert not list(Path(inspect.getfile(read_me)).parents[1].rglob("modeling_llama.py"))
