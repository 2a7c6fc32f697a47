"""Read-ME's cut from folder to folder: experts, index, figures, serving, refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from pregate.base.errors import UserError
from pregate.cli.main import main
from pregate.convert.domains.domains import read_domains, watched
from pregate.convert.domains.options import ReadMeOptions
from pregate.convert.domains.run import read_me
from pregate.convert.export.run import ExportOptions, export
from pregate.convert.measure.controls import static_mask
from pregate.convert.measure.evaluate import EvaluateOptions, evaluate
from pregate.convert.measure.overlap import swap_cost, total_cost
from pregate.convert.measure.scoring import score_rows
from pregate.convert.tune.options import TuneOptions
from pregate.convert.tune.run import tune
from pregate.model import CheckpointReader
from pregate.model.checkpoint import read_manifest, write_manifest
from pregate.model.gated_mlp import find_gated_mlps
from pregate.model.layers import PathPolicy
from pregate.model.read_check import Hashes
from tests.convert.domains.read_me_cases import load, neurons_of, small
from tests.equality import reference_texts
from tests.router.serving import engine_in_process, hold


@pytest.fixture
def options(tiny_dense: Path, domains: tuple[Path, ...], tmp_path: Path) -> ReadMeOptions:
    return small(tiny_dense, tmp_path / "out", domains)


@torch.no_grad()
def test_an_expert_is_what_fires_most_on_its_domain(cut: Path, tiny_dense: Path, domains: tuple[Path, ...]):
    """Counted anew by hand: forward the windows, compute every layer's h from its input, average |h|."""
    dense: Any = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32).eval()
    texts = read_domains(domains, AutoTokenizer.from_pretrained(tiny_dense), 4, 32, 1500, 0)
    mlps, model = find_gated_mlps(dense), load(cut)
    for index, text in enumerate(texts):
        seen: list[torch.Tensor] = []
        with watched([mlp.module for mlp in mlps], lambda _layer, x_TD, seen=seen: seen.append(x_TD)):
            dense(text.windows_SN)
        for x_TD, mlp, routed in zip(seen, mlps, model.routed_mlps, strict=True):
            mean_I = (F.silu(x_TD @ mlp.gate.T) * (x_TD @ mlp.up.T)).abs().mean(dim=0)
            assert neurons_of(routed)[index].tolist() == sorted(mean_I.topk(64).indices.tolist())


@torch.no_grad()
def test_the_checkpoint_is_the_dense_model_masked_by_index(cut: Path, tiny_dense: Path):
    """Whatever index a token has: the FFN with the other channels' activations set to 0, in every layer."""
    dense: Any = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32).eval()
    model = load(cut)
    ids_BN = torch.tensor([[1, *range(20, 60)]])
    indices_T = torch.arange(41) % 3
    model.routing_policy = PathPolicy(indices_T[:, None, None].expand(41, 3, 1))
    for mlp, routed in zip(find_gated_mlps(dense), model.routed_mlps, strict=True):
        mask_RI = torch.zeros(3, 128).scatter_(1, neurons_of(routed).long(), 1.0)
        down = next(m for m in mlp.module.modules() if getattr(m, "weight", None) is mlp.down)
        down.register_forward_pre_hook(lambda _m, x, mask=mask_RI[indices_T]: (x[0] * mask,))
    torch.testing.assert_close(model(ids_BN).logits, dense(ids_BN).logits, rtol=0, atol=1e-5)
    model.routing_policy = None
    assert (model(ids_BN).logits - dense(ids_BN).logits).abs().max() > 1e-2


def test_paths_are_exact_and_one_index_serves_all_layers(cut: Path):
    reader, model = CheckpointReader(cut, hashes=Hashes.FIRST), load(cut)
    assert (reader.config.routing, reader.manifest.method) == ("path", "read-me")
    assert [(c.num_routed, c.num_shared, c.num_active, c.expert_width) for c in reader.config.cuts] == [
        (3, 0, 1, 64)
    ] * 3
    paths = model.paths([1, *range(20, 90)])
    paths.check(reader.config.cuts)
    assert paths.exact
    assert paths.ids.shape == (71, 3, 1)
    assert (paths.ids == paths.ids[:, :1]).all()
    assert len(np.unique(paths.ids)) > 1


@torch.no_grad()
def test_separate_is_the_same_function_as_fused(options: ReadMeOptions, tmp_path: Path):
    wide = replace(options, active_share=0.75, steps=0)
    read_me(wide)
    read_me(replace(wide, out=tmp_path / "separate", permanent="separate"))
    fused, separate = load(options.out), load(tmp_path / "separate")
    assert [c.num_shared for c in fused.config.cuts] == [0, 0, 0]
    assert all(c.shared_width + c.expert_width == 96 for c in separate.config.cuts)
    assert any(c.num_shared for c in separate.config.cuts)
    ids_BN = torch.tensor([[1, *range(20, 60)]])
    policy = PathPolicy((torch.arange(41) % 3)[:, None, None].expand(41, 3, 1))
    logits = []
    for model in (fused, separate):
        model.routing_policy = policy
        logits.append(model(ids_BN).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)


def test_figures_are_of_the_checkpoint(cut: Path, tiny_dense: Path, domains: tuple[Path, ...]):
    model, figures = load(cut), CheckpointReader(cut).manifest.figures
    texts = read_domains(domains, AutoTokenizer.from_pretrained(tiny_dense), 4, 32, 1500, 0)
    dense: Any = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32).eval()
    assert [row["name"] for row in figures["by_domain"]] == ["trade", "verse", "harbour"]
    for text, row in zip(texts, figures["by_domain"], strict=True):
        assert row["routed_perplexity"] == round(score_rows(model, text.held_back).perplexity, 4)
        assert row["dense_perplexity"] == round(score_rows(dense, text.held_back).perplexity, 4)
        indices = np.concatenate([model.paths(row).ids[:, 1, 0] for row in text.held_back])
        expected = [round(float((indices == expert).mean()), 4) for expert in range(3)]
        assert row["expert_share"] == expected
    rows = [row for text in texts for row in text.held_back]
    assert figures["routed_perplexity"] == round(score_rows(model, rows).perplexity, 4)
    layers = zip(model.routed_mlps, model.config.cuts, strict=True)
    cost = total_cost([swap_cost(mlp.neuron_index.numpy(), c, 3 * 64 * 4) for mlp, c in layers])
    unit = CheckpointReader(cut).unit_bytes(0)
    assert figures["swap"]["full_bytes"] == cost.full == 3 * unit
    assert figures["swap"]["differing_bytes"] == cost.differing_RR.tolist()
    assert 0 < figures["swap"]["saved_share"] < 1
    assert figures["coverage"] == [round(len(mlp.neuron_index.unique()) / 128, 4) for mlp in model.routed_mlps]
    assert figures["active_share"] == 0.5


def test_served_by_two_hosts_it_equals_the_reference(cut: Path):
    model = load(cut)
    rng = np.random.default_rng(3)
    prompts = [[1, *rng.integers(3, 512, size=n).tolist()] for n in (5, 17, 30)]
    references = reference_texts(model, prompts, 12)
    with engine_in_process(cut, 2) as engine:
        hold(engine, "two hosts", references)
        assert all(client.stats.groups > 0 for client in engine.exchange.clients)


def test_evaluate_and_its_controls(cut: Path, tiny_dense: Path, domains: tuple[Path, ...], tmp_path: Path):
    """All experts together are not the dense parent: that is the one the manifest names."""
    lost = tmp_path / "lost"
    shutil.copytree(cut, lost)
    manifest = read_manifest(lost)
    write_manifest(lost, replace(manifest, source=manifest.source | {"path": "/nowhere"}))
    with pytest.raises(UserError, match=r"model .*layer 0's experts overlap .* give the dense model with parent"):
        evaluate(EvaluateOptions(lost, (domains[1],), controls=True))
    result = evaluate(EvaluateOptions(cut, (domains[1],), controls=True, parent=tiny_dense))
    assert evaluate(EvaluateOptions(cut, (domains[1],), controls=True)) == result
    table = result["controls"]
    assert list(table) == ["dense parent", "static mask", "random routing", "linear gate", "path router", "oracle"]
    assert {row["active_share"] for name, row in table.items() if name != "dense parent"} == {0.5}
    assert result["perplexity"] == table["path router"]["perplexity"]
    assert table["oracle"]["mean_overlap"] == 1.0
    assert table["linear gate"]["mean_overlap"] > table["random routing"]["mean_overlap"]


def test_tuning_it_further_needs_a_teacher(cut: Path, domains: tuple[Path, ...], tmp_path: Path):
    """Without one `tune` takes all experts together for the parent."""
    with pytest.raises(UserError, match=r"its experts overlap or leave neurons out.*give teacher \S+, or kl_share 0"):
        tune(TuneOptions(model=cut, out=tmp_path / "out", text=domains[:1], steps=1))


@torch.no_grad()
def test_the_static_mask_counts_a_neuron_once(cut: Path, tiny_dense: Path):
    dense: Any = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32).eval()
    rows, model = [[1, *range(3, 90)]], load(cut)
    for parent, mlp in zip(find_gated_mlps(dense), model.routed_mlps, strict=True):
        score = dict(zip(mlp.neuron_index.tolist(), mlp.neuron_score.tolist(), strict=True))
        kept = sorted(score, key=lambda neuron: -score[neuron])[:64]
        parent.down.data[:, [n for n in range(128) if n not in kept]] = 0
    with static_mask(model):
        masked = score_rows(model, rows)
    assert masked.perplexity == pytest.approx(score_rows(dense, rows).perplexity, rel=1e-5)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("dense", "format dense: layer 0 .*: its neuron_index is no permutation: experts overlap"),
        ("qwen2_moe", "format qwen2_moe: .*the class has no path router"),
    ],
)
def test_it_cannot_be_exported(cut: Path, tmp_path: Path, form: Literal["dense", "qwen2_moe"], reason: str):
    with pytest.raises(UserError, match=reason):
        export(ExportOptions(cut, tmp_path / "out", form))
    assert not (tmp_path / "out").exists()


def test_stored_in_half_it_is_measured_as_stored(options: ReadMeOptions):
    figures = read_me(replace(options, dtype="bfloat16")).figures
    assert CheckpointReader(options.out).read_unit(1, 0)[0].dtype == torch.bfloat16
    model = load(options.out)
    assert model.path_router is not None
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = read_domains(options.domains, tokenizer, 4, 32, 1500, 0)
    assert figures["by_domain"][1]["routed_perplexity"] == round(score_rows(model, texts[1].held_back).perplexity, 4)
    assert figures["swap"]["full_bytes"] == 3 * CheckpointReader(options.out).unit_bytes(0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"domains": (Path("/one"),)}, "domain: 1 given; allowed: 2 or more"),
        ({"domains": (Path("/one"), Path("/one"))}, "domain /one: given twice"),
        ({"domains": (Path("/no"), Path("/where"))}, "domain /no: no such path"),
        ({"active_share": 0.0}, "active_share 0.0: allowed: above 0, at most 1"),
        ({"permanent": "both"}, "permanent both: allowed: fused, separate"),
        ({"target": "mass"}, "target mass: allowed: overlap, contribution"),
        ({"rounds": 0}, "rounds 0: allowed: 1 or more"),
        ({"steps": -1}, "steps -1: allowed: 0 or more"),
        ({"kl_share": 1.5}, "kl_share 1.5: allowed: 0 to 1"),
        ({"decay": 0.0}, "decay 0.0: allowed: above 0, at most 1"),
        ({"dim": 18}, "dim 18: allowed: multiples of 4"),
        ({"model": Path("/nowhere")}, "model /nowhere: no such path"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(options: ReadMeOptions, change: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        read_me(replace(options, **change))
    assert list(options.out.parent.iterdir()) == []


def test_a_converted_checkpoint_is_refused(options: ReadMeOptions, cut: Path):
    with pytest.raises(UserError, match="is a pregate checkpoint already"):
        read_me(replace(options, model=cut))


def test_the_command(tiny_dense: Path, domains: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = ["read-me", "--model", tiny_dense, "--out", tmp_path / "out", "--domain", *domains, "--rounds", "1"]
    arguments += ["--router-steps", "2", "--steps", "1", "--samples", "2", "--sequence-length", "24", "--batch", "2"]
    arguments += ["--router-batch", "2", "--pool-tokens", "300", "--dim", "16", "--permanent", "separate"]
    assert main([str(a) for a in arguments]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "out" / "manifest.json").read_text())["figures"]
    assert f"{figures['swap']['full_bytes']:,} bytes" in printed
    for row in figures["by_domain"]:
        assert f"{row['name']:<20}{row['dense_perplexity']:>10.2f}{row['routed_perplexity']:>10.2f}" in printed
    assert main(["read-me", "--model", str(tiny_dense), "--out", str(tmp_path / "x"), "--domain", str(domains[0])]) == 2
    assert "--domain: 1 given" in capsys.readouterr().err
