"""Exported stock folders: plain transformers computes what the checkpoint does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from benchmarks.export import PROMPTS
from pregate.base.errors import PregateError, UserError
from pregate.base.options import Dtype
from pregate.cli.main import main
from pregate.convert.export.check import compare_logits, first_difference, load_stock
from pregate.convert.export.gate_scale import centred, expected_others, measure_scales, stock_weights
from pregate.convert.export.run import TOLERANCE, ExportOptions, export
from pregate.convert.measure.scoring import routed_by
from pregate.convert.progress import QUIET
from pregate.model import RoutedForCausalLM
from pregate.model.folder import read_folder
from pregate.model.layers import GatePolicy
from tests.convert.export.exporting import altered, convert_stock, stored
from tests.equality import reference_text, refuse_degenerate
from tests.families import FAMILIES, SIZES, WINDOW, save_random


@pytest.fixture(scope="module")
def stock_export(stock_checkpoint: Path) -> Path:
    out = stock_checkpoint.parent / "exported"
    export(ExportOptions(stock_checkpoint, out, "qwen2_moe"))
    return out


def test_stock_weights_are_those_of_the_class():
    """The router of transformers' class and ours agree, and shrinking a gate evens its weights out."""
    config = Qwen2MoeConfig(hidden_size=16, num_experts=5, num_experts_per_tok=3, norm_topk_prob=True)
    router, generator = Qwen2MoeTopKRouter(config), torch.Generator().manual_seed(0)
    x_TD, gate_RD = torch.randn(40, 16, generator=generator), torch.randn(5, 16, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        router.weight.data = gate_RD.to(dtype)
        _logits, weights_TK, ids_TK = router(x_TD.to(dtype))
        ours_TR = stock_weights(x_TD, gate_RD.to(dtype), 3)
        assert torch.equal(ours_TR.gather(-1, ids_TK), weights_TK.float())
        assert (ours_TR > 0).sum() == 40 * 3
    small_TR = stock_weights(x_TD, centred(gate_RD) * 2**-12, 3)
    assert (small_TR[small_TR > 0] - 1 / 3).abs().max() < 1e-3
    assert torch.equal(small_TR > 0, stock_weights(x_TD, gate_RD, 3) > 0)


def test_expected_others_by_hand():
    """A rate of 0.03 / 7 over the rare ones; the last, where half the tokens are concerned, is left out of it."""
    factors, shares = torch.tensor([1.0, 0.5, 0.25, 0.125]), torch.tensor([0.0, 0.01, 0.02, 0.5])
    rate = 0.03 / 7
    assert torch.allclose(expected_others(factors, shares), torch.tensor([rate, 2 * rate, 4 * rate, 8 * rate]))


def test_where_texts_part_by_hand():
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1]) == first_difference([1], [1, 2]) == 1


def test_a_policy_does_not_outlive_an_error(stock_checkpoint: Path):
    """An id beyond the vocabulary stops the measurement; the model routes as its checkpoint says afterwards."""
    model: Any = RoutedForCausalLM.from_pretrained(stock_checkpoint).eval()
    with pytest.raises(IndexError):
        measure_scales(model, [[512]], 10, torch.float32, None)
    assert model.routing_policy is None
    outer = GatePolicy()
    with routed_by(model, outer), pytest.raises(IndexError), routed_by(model, GatePolicy()):
        raise IndexError
    assert model.routing_policy is None
    with routed_by(model, outer):
        with routed_by(model, GatePolicy()):
            assert model.routing_policy is not outer
        assert model.routing_policy is outer


STOCK_PARENTS: Mapping[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, attention_bias=False, rope_parameters=FAMILIES["llama"].rope_parameters),
    "llama tied": FAMILIES["llama tied"],
    "mistral": FAMILIES["mistral"],
    "qwen2": FAMILIES["qwen2"],
    "phi3": FAMILIES["phi3"],
}


@torch.no_grad()
@pytest.mark.parametrize("parent", STOCK_PARENTS)
def test_stock_model_is_the_routed_one(parent: str, tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    """Within the exported context, logits and greedy texts are the routed model's; names are save_pretrained's."""
    dense = save_random(STOCK_PARENTS[parent], tiny_dense, tmp_path / "dense")
    routed_folder = convert_stock(dense, tmp_path / "routed", tiny_text)
    figures = export(ExportOptions(routed_folder, tmp_path / "out", "qwen2_moe"))
    windowed = parent in ("mistral", "qwen2", "phi3")
    assert figures["context_tokens"] == (WINDOW if windowed else 256)
    assert figures["measured_on"].startswith("random tokens") and figures["routed_perplexity"] is None
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(stock).__name__ == "Qwen2MoeForCausalLM"
    routed = RoutedForCausalLM.from_pretrained(routed_folder).eval()
    ids = torch.randint(3, 512, (4, figures["context_tokens"]), generator=torch.Generator().manual_seed(7))
    difference_BN = (stock(ids).logits - routed(ids).logits).abs().amax(dim=-1) / routed(ids).logits.abs().max()
    assert difference_BN.median() < 1e-3
    assert (difference_BN < 1e-2).float().mean() > 0.9, "but after an expert at a near tie"
    stock.save_pretrained(tmp_path / "again")
    again = stored(tmp_path / "again")
    assert stored(tmp_path / "out").keys() == again.keys()


def test_every_text_that_is_given_is_measured_on(stock_checkpoint: Path, tiny_text: Path, tmp_path: Path):
    """The last path won."""
    paragraphs, found = tiny_text.read_text(encoding="utf-8").split("\n\n"), []
    for name, some in {"a": paragraphs[:8], "b": paragraphs[8:]}.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(some), encoding="utf-8")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    for number, texts in enumerate((files[:1], files[1:], files)):
        out = tmp_path / str(number)
        command = ["export", "--model", str(stock_checkpoint), "--out", str(out), "--format", "qwen2_moe", "--text"]
        assert main([*command, *texts]) == 0
        found.append(json.loads((out / "export.json").read_text())["figures"])
    assert found[2]["num_positions"] == found[0]["num_positions"] + found[1]["num_positions"]
    assert found[2]["measured_on"] == " ".join(files)


def test_record_and_older_readers(stock_checkpoint: Path, tiny_text: Path, tmp_path: Path):
    """What was measured lies in the folder; the config has rotation and type under transformers 4's names too."""
    out = tmp_path / "out"
    figures = export(ExportOptions(stock_checkpoint, out, "qwen2_moe", text=(tiny_text,)))
    record = json.loads((out / "export.json").read_text())
    assert record["figures"] == figures
    assert len(record["layers"]) == 3 and all(layer["other_experts"] < 3e-3 for layer in record["layers"])
    assert all(layer["weight_error"] < 1e-2 for layer in record["layers"])
    assert abs(figures["perplexity_ratio"] - 1) < 5e-3
    assert int(figures["greedy_texts_equal"].removesuffix(" of 5")) >= 4
    assert all(min(text["margin"], text["gate_margin"]) < 1e-2 for text in figures["greedy_texts_part"])
    assert str(figures["exported_perplexity"]) in (out / "README.md").read_text()
    fields = json.loads((out / "config.json").read_text())
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] and fields["rope_scaling"] is None
    assert fields["torch_dtype"] == fields["dtype"] == "float32"
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (stock_checkpoint / name).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types(dtype: Dtype, stock_checkpoint: Path, tiny_text: Path, tmp_path: Path):
    options = ExportOptions(stock_checkpoint, tmp_path / "out", "qwen2_moe", text=(tiny_text,), dtype=dtype)
    figures = export(options)
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {getattr(torch, dtype)}
    assert 0 < figures["median_relative_difference"] < TOLERANCE[dtype]
    assert abs(figures["perplexity_ratio"] - 1) < 0.05


def test_scale_is_what_was_asked(stock_checkpoint: Path, tmp_path: Path):
    """--scale sets every gate's largest weight; one too large is refused, for weights are then not equal."""
    export(ExportOptions(stock_checkpoint, tmp_path / "out", "qwen2_moe", scale=1e-3))
    gates = [tensor for name, tensor in stored(tmp_path / "out").items() if name.endswith("mlp.gate.weight")]
    assert len(gates) == 3
    assert all(abs(gate.abs().max() - 1e-3) < 1e-8 for gate in gates)
    with pytest.raises(UserError, match=r"scale 1.0: logits differ .* without scale it is measured"):
        export(ExportOptions(stock_checkpoint, tmp_path / "wild", "qwen2_moe", scale=1.0))


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "threshold": ({"selection": "threshold"}, "selection by threshold .* recipe stock"),
    "intercept": ({"intercept": True}, "intercept in its gate .* recipe stock"),
    "representative": ({"gate": "representative"}, "no representative gate; .* recipe stock"),
    "static": ({"shared": 3, "active": 0}, "no routed expert runs; convert with active 1"),
    "no shared": ({"shared": 0}, "leave the shared expert out; convert with shared 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    method, message = REFUSED[case]
    routed = convert_stock(tiny_dense, tmp_path / "routed", tiny_text, **method)
    with pytest.raises(UserError, match=f"format qwen2_moe: .*{message}"):
        export(ExportOptions(routed, tmp_path / "out", "qwen2_moe"))
    assert [p.name for p in tmp_path.iterdir()] == ["routed"], "nothing is left behind"


@pytest.mark.parametrize(
    ("family", "lacks"),
    [
        ("gemma2", "capped logits"),
        ("granite", "multipliers"),
        ("olmo2", "norms after each block"),
        ("qwen3", "norms of queries and keys"),
        ("phi3 longrope", "longrope"),
        ("llama", r"no place for self_attn\.o_proj\.bias"),
    ],
)
def test_refused_families(family: str, lacks: str, tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    dense = save_random(FAMILIES[family], tiny_dense, tmp_path / "dense")
    routed = convert_stock(dense, tmp_path / "routed", tiny_text, samples=2, sequence_length=12)
    with pytest.raises(UserError, match=f"format qwen2_moe: .*{lacks}"):
        export(ExportOptions(routed, tmp_path / "out", "qwen2_moe"))


def test_refused_path_and_cuts(stock_checkpoint: Path, tiny_path_checkpoint: Path, tiny_dense: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"path router .*tiny-layerwise"):
        export(ExportOptions(tiny_path_checkpoint, tmp_path / "out", "qwen2_moe"))
    with pytest.raises(UserError, match=r"is a dense model"):
        export(ExportOptions(tiny_dense, tmp_path / "out", "qwen2_moe"))
    cuts = json.loads((stock_checkpoint / "config.json").read_text())["layer_cuts"]
    other = [cuts[0] | {"num_active": 2}, *cuts[1:]]
    with pytest.raises(UserError, match=r"cut of its own for each layer .*give shared a number"):
        export(
            ExportOptions(
                altered(stock_checkpoint, tmp_path / "cuts", {"layer_cuts": other}, {}), tmp_path / "out", "qwen2_moe"
            )
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rope_theta": 100.0},
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 2},
        {"rms_norm_eps": 0.1},
    ],
)
def test_a_wrong_config_would_be_seen(
    wrong: dict[str, Any], stock_checkpoint: Path, stock_export: Path, tmp_path: Path
):
    """Had the exported config one field wrong, the median difference would be beyond what is let through."""
    shutil.copytree(stock_export, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(fields[name] != value for name, value in wrong.items())
    (tmp_path / "out" / "config.json").write_text(json.dumps(fields | wrong))
    routed = RoutedForCausalLM.from_pretrained(stock_checkpoint).eval()
    rows = torch.randint(3, 512, (4, 64), generator=torch.Generator().manual_seed(0)).tolist()
    figures = compare_logits(routed, load_stock(tmp_path / "out"), rows, QUIET)
    assert figures["median_relative_difference"] > 4 * TOLERANCE["float32"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(fields | {"mlp_only_layers": [1]}))
    with pytest.raises(PregateError, match=r"does not load what was written: model\.layers\.1\.mlp"):
        load_stock(tmp_path / "out")


def test_command(stock_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["export", "--model", str(stock_checkpoint), "--out", str(tmp_path / "out"), "--format"]
    assert main([*command, "dense"]) == 0
    assert "tensors_equal                30 of 30" in capsys.readouterr().out
    assert main([*command, "gguf"]) == 2
    assert "--format gguf: allowed: qwen2_moe, dense" in capsys.readouterr().err
    assert main([*command, "dense", "--scale", "0.1"]) == 2
    assert "--scale 0.1: goes with --format qwen2_moe only" in capsys.readouterr().err
    assert main([*command, "qwen2_moe", "--max-tokens", "100"]) == 2
    assert "--max-tokens 100: goes with --text only" in capsys.readouterr().err


PLAIN = """\
import sys
sys.modules["pregate"] = None  # importing it now fails
import json
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
texts = []
for prompt in prompts:
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
    texts.append(new[0, ids.shape[1] :].tolist())
print(json.dumps({"class": type(model).__name__, "texts": texts}))
"""


@pytest.mark.slow
def test_plain_transformers_without_pregate(shared_folder: Path, tmp_path: Path):
    """stories3M, S3A3E8: greedy texts of 8 prompts in a process in which pregate cannot be imported."""
    stories = shared_folder / "text" / "stories"
    options = {"samples": 4, "sequence_length": 256}
    routed_folder = convert_stock(
        shared_folder / "models" / "stories3M", tmp_path / "routed", stories / "ts_train.jsonl", 3, 3, **options
    )
    figures = export(
        ExportOptions(routed_folder, tmp_path / "out", "qwen2_moe", (stories / "ts_heldout.jsonl",), max_tokens=2500)
    )
    assert abs(figures["perplexity_ratio"] - 1) < 2e-3
    assert figures["same_top_token"] > 0.995
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "out"), json.dumps(PROMPTS)]
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=surroundings)
    plain = json.loads(ran.stdout.splitlines()[-1])
    assert plain["class"] == "Qwen2MoeForCausalLM"
    routed = RoutedForCausalLM.from_pretrained(routed_folder).eval()
    tokenizer = read_folder(routed_folder).tokenizer
    ours = [reference_text(routed, [1, *tokenizer(p, add_special_tokens=False)["input_ids"]], 40) for p in PROMPTS]
    refuse_degenerate(ours)
    same = sum(text.tokens == theirs for text, theirs in zip(ours, plain["texts"], strict=True))
    assert same >= 7, "rounding may choose another expert at a near tie, but seldom"
