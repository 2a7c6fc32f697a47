"""The controls beside a routed checkpoint: who they are, and that each is what its name says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pregate.base.errors import UserError
from pregate.cli.main import main
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.measure.agreement import AgreementMeter
from pregate.convert.measure.control_table import control_rows
from pregate.convert.measure.controls import static_mask
from pregate.convert.measure.evaluate import EvaluateOptions, evaluate
from pregate.convert.measure.scoring import score_rows
from pregate.model import RoutedForCausalLM
from pregate.model.gated_mlp import find_gated_mlps
from pregate.model.layers import GatePolicy, RoutedMLP

ROWS = [[1, *range(3, 90)], [1, *range(200, 240)], [1, 7, 9, 400]]
NUM_BYTES = 500
BEFORE = ["dense parent", "static mask", "random routing", "paper's gate", "linear gate"]
AFTER = ["oracle", "oracle, fixed number"]


@pytest.fixture(scope="module", params=["layerwise", "path"])
def checkpoint(
    request: pytest.FixtureRequest, tiny_layerwise_checkpoint: Path, tiny_path_checkpoint: Path
) -> tuple[str, Path]:
    return request.param, tiny_layerwise_checkpoint if request.param == "layerwise" else tiny_path_checkpoint


@pytest.fixture(scope="module")
def table(checkpoint: tuple[str, Path], tiny_dense: Path) -> dict[str, dict[str, float]]:
    return control_rows(_load(checkpoint[1]), ROWS, NUM_BYTES, _dense(tiny_dense))


def _load(path: Path) -> RoutedForCausalLM:
    return RoutedForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _dense(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _own_names(kind: str) -> list[str]:
    return [*BEFORE, *(["path router"] if kind == "path" else []), *AFTER]


def test_only_what_is_asked_for_is_scored(checkpoint: tuple[str, Path], table: dict, tiny_dense: Path):
    some = control_rows(_load(checkpoint[1]), ROWS, NUM_BYTES, _dense(tiny_dense), only=("oracle", "random routing"))
    assert control_rows(_load(checkpoint[1]), ROWS, NUM_BYTES, score_rows(_dense(tiny_dense), ROWS), only=()) == {
        "dense parent": table["dense parent"]
    }
    assert some == {name: table[name] for name in ("dense parent", "random routing", "oracle")}


def test_names_and_order(checkpoint: tuple[str, Path], table: dict):
    assert list(table) == _own_names(checkpoint[0])
    for name, row in table.items():
        figures = {"perplexity", "ratio_to_dense", "bits_per_byte", "active_share"}
        agreement = set() if name in BEFORE[:2] else {"same_set", "mean_overlap"}
        assert set(row) == figures | agreement
        assert row["ratio_to_dense"] == pytest.approx(row["perplexity"] / table["dense parent"]["perplexity"], rel=1e-3)


def test_no_fixed_oracle_where_the_number_is_fixed(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    stock: dict[str, Any] = {"model": tiny_dense, "out": tmp_path / "out", "calibration": (tiny_text,)}
    method = {"samples": 8, "sequence_length": 64}
    convert(ConvertOptions(recipe="stock", **(method), experts=8, shared=2, active=2, **stock))
    assert list(control_rows(_load(tmp_path / "out"), ROWS, NUM_BYTES)) == [*BEFORE, "oracle"]


def test_dense_is_the_parent(checkpoint: tuple[str, Path], table: dict, tiny_dense: Path):
    parent = score_rows(_dense(tiny_dense), ROWS)
    assert table["dense parent"]["perplexity"] == pytest.approx(parent.perplexity, abs=1e-3)
    assert (table["dense parent"]["ratio_to_dense"], table["dense parent"]["active_share"]) == (1.0, 1.0)
    without = control_rows(_load(checkpoint[1]), ROWS, NUM_BYTES)
    assert without["dense parent"]["perplexity"] == pytest.approx(parent.perplexity, rel=1e-5)
    assert {n: r for n, r in without.items() if n != "dense parent"}.keys() == set(table) - {"dense parent"}


def test_the_static_mask_is_the_dense_model_without_the_other_neurons(
    checkpoint: tuple[str, Path], table: dict, tiny_dense: Path
):
    """S2A2E8: half the neurons of each layer, those of greatest mean contribution, whatever expert they are in."""
    dense = _dense(tiny_dense)
    for parent, mlp in zip(find_gated_mlps(dense), _load(checkpoint[1]).routed_mlps, strict=True):
        by_score = sorted(range(128), key=lambda row: -float(mlp.neuron_score[row]))
        dropped = mlp.neuron_index[by_score[64:]].long()
        assert set(by_score[:64]) != set(range(64))  # not simply the first experts
        parent.down.data[:, dropped] = 0
    masked = score_rows(dense, ROWS)
    assert table["static mask"]["perplexity"] == pytest.approx(masked.perplexity, rel=1e-5)
    assert masked.perplexity > 1.01 * table["dense parent"]["perplexity"]


def test_the_static_mask_is_undone(checkpoint: tuple[str, Path]):
    model = _load(checkpoint[1])
    before, mlps = score_rows(model, ROWS).nats, model.routed_mlps
    with static_mask(model):
        assert score_rows(model, ROWS).nats != before
    with pytest.raises(ZeroDivisionError), static_mask(model):
        _ = 1 / 0
    assert all(ours is theirs for ours, theirs in zip(model.routed_mlps, mlps, strict=True))
    assert score_rows(model, ROWS).nats == before


def test_it_leaves_the_model_as_it_was_when_scoring_fails(checkpoint: tuple[str, Path]):
    model = _load(checkpoint[1])
    mlps = model.routed_mlps
    wider = LlamaConfig(
        vocab_size=600, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(IndexError):  # the text is outside the routed model's vocabulary
        control_rows(model, [[1, 5, 511 + 1]], NUM_BYTES, parent=LlamaForCausalLM(wider).eval())
    assert len(mlps) == 3
    assert all(ours is theirs for ours, theirs in zip(model.routed_mlps, mlps, strict=True))
    assert model.routing_policy is None


def test_active_shares(checkpoint: tuple[str, Path], table: dict):
    for name in ("static mask", "random routing", "paper's gate", "oracle, fixed number"):
        assert table[name]["active_share"] == 0.5, name  # (2 + 2) of 8
    meter = AgreementMeter()
    score_rows(_load(checkpoint[1]), ROWS, meter)
    own = "path router" if checkpoint[0] == "path" else "linear gate"
    assert table[own]["active_share"] == round(meter.active_share, 4)
    assert 0.25 < table["linear gate"]["active_share"] < 1  # two shared are always on
    assert table["linear gate"]["active_share"] != table["oracle"]["active_share"]  # each by its own threshold


def test_agreement_with_the_oracle(checkpoint: tuple[str, Path], table: dict):
    assert (table["oracle"]["same_set"], table["oracle"]["mean_overlap"]) == (1.0, 1.0)
    fixed = table["oracle, fixed number"]  # held to an oracle that takes as many
    assert (fixed["same_set"], fixed["mean_overlap"]) == (1.0, 1.0)
    assert 0.2 < table["random routing"]["mean_overlap"] < 0.45  # 2 of 6 by chance: a third
    assert table["linear gate"]["mean_overlap"] > table["random routing"]["mean_overlap"] + 0.05
    if checkpoint[0] == "path":
        meter = AgreementMeter()
        score_rows(_load(checkpoint[1]), ROWS, meter)
        assert meter.figures()["path_vs_oracle"].items() <= table["path router"].items()


def test_the_gate_in_use_gives_the_checkpoints_own_score(tiny_layerwise_checkpoint: Path):
    model = _load(tiny_layerwise_checkpoint)
    own = score_rows(model, ROWS).nats
    assert score_rows(model, ROWS, control=GatePolicy("linear_gate")).nats == own
    assert score_rows(model, ROWS, control=GatePolicy("paper_gate")).nats != own


def test_policies_ask_their_gate_whichever_is_in_use(checkpoint: tuple[str, Path]):
    x_TD = torch.randn(30, 64, generator=torch.Generator().manual_seed(2))
    mlp: RoutedMLP = _load(checkpoint[1]).routed_mlps[1]
    linear, paper = mlp.linear_gate, mlp.paper_gate
    assert linear is not None
    assert paper is not None
    for mlp.gate_kind in ("linear", "representative"):
        assert torch.equal(GatePolicy("linear_gate").choose(mlp, x_TD).ids, linear.choose(x_TD).ids)
        assert torch.equal(GatePolicy("paper_gate").choose(mlp, x_TD).ids, paper.choose(x_TD).ids)
    assert GatePolicy("linear_gate").choose(mlp, x_TD).ids.shape != GatePolicy("paper_gate").choose(mlp, x_TD).ids.shape


def test_random_routing_is_that_of_its_seed(tiny_layerwise_checkpoint: Path, table: dict, checkpoint: tuple[str, Path]):
    first, other = (control_rows(_load(checkpoint[1]), ROWS, NUM_BYTES, seed=seed) for seed in (0, 1))
    assert first["random routing"]["perplexity"] == table["random routing"]["perplexity"]
    assert first["random routing"] != other["random routing"]
    assert first["oracle"] == other["oracle"]


@torch.no_grad()
def test_a_checkpoint_with_no_active_expert(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    """S4A0E8: the dense row is still dense without a parent, and half the neurons run."""
    fields: dict[str, Any] = {"samples": 8, "sequence_length": 64}
    options = ConvertOptions(tiny_dense, tmp_path / "out", 8, 4, 0, (tiny_text,), **fields)
    assert convert(options).figures["active_share"] == 0.5
    model = _load(tmp_path / "out")
    table = control_rows(model, ROWS, NUM_BYTES)
    parent = score_rows(_dense(tiny_dense), ROWS)
    assert table["dense parent"]["perplexity"] == pytest.approx(parent.perplexity, rel=1e-5)
    assert {row["active_share"] for name, row in table.items() if name != "dense parent"} == {0.5}
    assert table["oracle"]["ratio_to_dense"] > 1.01


def _evaluate(capsys: pytest.CaptureFixture, path: Path, text: Path, *more: str) -> str:
    arguments = ["evaluate", "--model", str(path), "--text", str(text), "--max-tokens", "120", "--controls", *more]
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_the_command_line_prints_the_table(checkpoint: tuple[str, Path], tiny_text: Path, tiny_dense: Path, capsys):
    kind, path = checkpoint
    result = json.loads(_evaluate(capsys, path, tiny_text, "--json", "--parent", str(tiny_dense)))
    assert list(result["controls"]) == _own_names(kind)
    own = "path router" if kind == "path" else "linear gate"
    assert result["controls"][own]["perplexity"] == result["perplexity"]
    lines = _evaluate(capsys, path, tiny_text).splitlines()
    for name, row in result["controls"].items():
        (line,) = [line for line in lines if line[:24].rstrip() == name]
        columns = line[24:].split()
        assert float(columns[0]) == pytest.approx(row["perplexity"], rel=1e-4)
        assert len(columns) == len(row)


def test_refusals(tiny_dense: Path, tiny_layerwise_checkpoint: Path, tiny_text: Path, capsys):
    with pytest.raises(UserError, match=r"controls on: .* is a dense model; allowed: a routed checkpoint"):
        evaluate(EvaluateOptions(tiny_dense, (tiny_text,), controls=True))
    with pytest.raises(UserError, match=r"parent .*: needs controls"):
        EvaluateOptions(tiny_layerwise_checkpoint, (tiny_text,), parent=tiny_dense)
    for seed in (0, 7):
        with pytest.raises(UserError, match=f"seed {seed}: needs controls or max_tokens"):
            EvaluateOptions(tiny_layerwise_checkpoint, (tiny_text,), seed=seed)
    hollow = EvaluateOptions(tiny_layerwise_checkpoint, (tiny_text,), 5, controls=True, parent=tiny_text.parent)
    with pytest.raises(UserError, match=r"^parent \S+: not a model folder"):
        evaluate(hollow)
    command = ["evaluate", "--text", str(tiny_text), "--model"]
    assert main([*command, str(tiny_dense), "--controls"]) == 2
    assert main([*command, str(tiny_layerwise_checkpoint), "--parent", str(tiny_dense)]) == 2
    assert main([*command, str(tiny_layerwise_checkpoint), "--seed", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 3
