from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

from pregate.base.errors import CheckpointError, UserError
from pregate.cli.main import main
from pregate.convert.files.streamed import load_any
from pregate.convert.measure import scoring
from pregate.convert.measure.agreement import AgreementMeter, Tally
from pregate.convert.measure.controls import OraclePolicy, RandomPolicy
from pregate.convert.measure.evaluate import EvaluateOptions, evaluate
from pregate.convert.measure.scored_text import ScoredText
from pregate.convert.measure.scoring import Score, score_logits, score_rows
from pregate.convert.text.batches import batches, padded
from pregate.model import RoutedForCausalLM
from pregate.model.folder import read_folder
from pregate.model.gated_mlp import decoder_layers
from tests.convert.interruption import StopsAfter

TEXTS = ["The harbour lay quiet.", "O wind", "Seven loaves at four pence each make twenty-eight pence. " * 40, "x"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    return path


@torch.no_grad()
def _naive(model, tokenizer) -> tuple[float, int, int]:
    """One document at a time, no padding: nats, scored tokens, bytes of scored text."""
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :256]
        log_probs = model(ids, use_cache=False).logits[0, :-1].log_softmax(dim=-1)
        nats -= log_probs.gather(1, ids[0, 1:, None]).double().sum().item()
        num_tokens += ids.shape[1] - 1
        num_bytes += len(tokenizer.decode(ids[0, 1:]).encode())
    return nats, num_tokens, num_bytes


def test_score_by_hand_without_first_ids_and_padding():
    logits_BNV = torch.zeros(2, 3, 4)
    logits_BNV[1, 0, 2] = math.log(5)  # 5 of 8 for id 2
    ids_BN, mask_BN = torch.tensor([[1, 3, 3], [1, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    score = score_logits(logits_BNV, ids_BN, mask_BN) + Score(1.0, 2)
    assert score.num_tokens == 5
    assert score.nats == pytest.approx(2 * math.log(4) + math.log(8 / 5) + 1)


@pytest.mark.parametrize("kind", ["dense", "layerwise", "path"])
def test_batched_equals_one_by_one(
    kind: str, text: Path, tiny_dense: Path, tiny_layerwise_checkpoint: Path, tiny_path_checkpoint: Path
):
    path = {"dense": tiny_dense, "layerwise": tiny_layerwise_checkpoint, "path": tiny_path_checkpoint}[kind]
    model_class = AutoModelForCausalLM if kind == "dense" else RoutedForCausalLM
    model = model_class.from_pretrained(path, dtype=torch.float32).eval()
    nats, num_tokens, num_bytes = _naive(model, AutoTokenizer.from_pretrained(path))
    result = evaluate(EvaluateOptions(path, (text,)))
    assert result["num_tokens"] == num_tokens
    assert result["num_documents"] == 4
    assert result["perplexity"] == pytest.approx(math.exp(nats / num_tokens), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, abs=1e-4)
    assert (
        set(result.get("agreement", {}))
        == {
            "dense": set(),
            "layerwise": {"gate_vs_oracle"},
            "path": {"path_vs_gate", "path_vs_oracle", "gate_vs_oracle"},
        }[kind]
    )


@pytest.mark.parametrize("kind", ["layerwise", "path"])
def test_agreement_does_not_count_padding(kind: str, tiny_layerwise_checkpoint: Path, tiny_path_checkpoint: Path):
    path = tiny_layerwise_checkpoint if kind == "layerwise" else tiny_path_checkpoint
    model = RoutedForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rows = [[1, 7, 9, 11, 13, 200, 201], [1, 44], [1, 5, 6]]
    together, alone = AgreementMeter(), AgreementMeter()
    score_rows(model, rows, together)
    for row in rows:
        score_rows(model, [row], alone)
    assert together.figures() == alone.figures()
    assert together.tallies["gate_vs_oracle"].num_pairs == 12 * 3
    assert model.routing_policy is None


def test_a_perplexity_too_large_for_a_float_is_infinite_and_no_number_stays_none():
    assert Score(2 * 699.0, 2).perplexity == math.exp(699)
    assert Score(2 * 710.0, 2).perplexity == math.inf
    assert math.isnan(Score(math.nan, 2).perplexity)


def test_tally_by_hand():
    tally = Tally()
    tally.add(torch.tensor([[0, 2], [1, 3], [0, 1]]), torch.tensor([[0, 2], [3, 4], [2, 3]]))
    assert (tally.num_pairs, tally.num_equal, tally.sum_overlap) == (3, 1, 1.5)
    assert tally.figures() == {"same_set": 0.3333, "mean_overlap": 0.5}


def test_batches_hold_every_row_once_and_keep_to_their_size():
    rows = [[0] * n for n in (3, 9, 1, 4, 30, 4, 2)]
    groups = list(batches(rows, 12))
    assert sorted(i for g in groups for i in g) == list(range(7))
    assert groups == [[4], [1], [3, 5, 0], [6, 2]]
    ids, mask = padded([[5, 6], [7]])
    assert (ids.tolist(), mask.tolist()) == ([[5, 6], [7, 0]], [[1, 1], [1, 0]])


def test_max_tokens_stops_in_the_middle_of_a_document(text: Path, tiny_dense: Path):
    assert evaluate(EvaluateOptions(tiny_dense, (text,), 30))["num_tokens"] == 30


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_left_out_is_drawn_from_every_folder_alike(tmp_path: Path, tiny_dense: Path, seed: int):
    """Not the end of the last one, nor most of the smallest: documents of two folders alternate."""
    for folder, num_documents in (("a", 24), ("b", 6)):
        (tmp_path / folder).mkdir()
        lines = (json.dumps({"text": f"{folder} {i} loaves"}) + "\n" for i in range(num_documents))
        (tmp_path / folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    text = ScoredText.read(read_folder(tiny_dense), [tmp_path], 40, seed)
    tokenizer = AutoTokenizer.from_pretrained(tiny_dense)
    drawn = [tokenizer.decode(row[1:]) for row in text.rows]
    assert 6 <= len(drawn) <= 12
    assert [words[0] for words in drawn] == (["a", "b"] * 6)[: len(drawn)]
    assert drawn[:-1] != [f"{folder} {i} loaves" for i in range(6) for folder in ("a", "b")][: len(drawn) - 1]
    result = evaluate(EvaluateOptions(tiny_dense, (tmp_path,), 40, seed=seed))
    dense = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32).eval()
    assert result["perplexity"] == pytest.approx(score_rows(dense, text.rows).perplexity, abs=1e-3)


def test_every_file_given_is_scored_and_a_missing_one_refused(capsys, tiny_dense: Path, tmp_path: Path):
    """On the command line the last of several used to win, and one that is missing before it passed."""
    for name, count in (("a.jsonl", 2), ("b.jsonl", 3)):
        lines = [json.dumps({"text": f"{name} {i}: seven loaves at four pence each " * 9}) for i in range(count)]
        (tmp_path / name).write_text("\n".join(lines))
    command = ["evaluate", "--model", str(tiny_dense), "--json", "--text"]
    for given in (["a.jsonl", "b.jsonl"], ["*.jsonl"]):
        assert main([*command, *(str(tmp_path / name) for name in given)]) == 0
        assert json.loads(capsys.readouterr().out)["num_documents"] == 5
    for given in (["none.txt", "b.jsonl"], ["b.jsonl", "none.txt"], ["b.jsonl", "*.txt"]):
        assert main([*command, *(str(tmp_path / name) for name in given)]) == 2
        assert f"--text {tmp_path}" in capsys.readouterr().err


def test_too_little_text_is_refused_and_little_is_said(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    (tmp_path / "word.txt").write_text("harbour lay quiet")
    with pytest.raises(UserError, match=r"^text .*word.txt: holds \d+ tokens of text; 100 are the least, 5,000 are"):
        evaluate(EvaluateOptions(tiny_dense, (tmp_path / "word.txt",)))
    progress = StopsAfter(-1)
    evaluate(EvaluateOptions(tiny_dense, (tiny_text,)), progress)
    evaluate(EvaluateOptions(tiny_dense, (tiny_text,), max_tokens=50), progress)  # asked for so few
    assert re.fullmatch(r"--text \S+: [\d,]+ tokens of text are few; 5,000 are enough", "".join(progress.notes))


def tiny_mixture() -> Qwen2MoeForCausalLM:
    """What an export is: its head asks what lies below it for more than hidden states."""
    config = Qwen2MoeConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_experts=4)
    config.num_key_value_heads, config.moe_intermediate_size, config.shared_expert_intermediate_size = 4, 32, 32
    return Qwen2MoeForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["dense", "layerwise", "path", "mixture"])
def test_logits_in_pieces_score_the_same(
    kind: str, monkeypatch, tiny_dense: Path, tiny_layerwise_checkpoint: Path, tiny_path_checkpoint: Path
):
    """A document of any length with any vocabulary holds no more logits at a time than it may."""
    path = {"dense": tiny_dense, "layerwise": tiny_layerwise_checkpoint, "path": tiny_path_checkpoint}.get(kind)
    model = tiny_mixture() if path is None else load_any(read_folder(path))
    rows = [list(range(1, 200)), list(range(5, 190)), [7, 8]]
    whole, sizes = score_rows(model, rows), []
    monkeypatch.setattr(scoring, "MOST_LOGITS", 64 * 512)
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: sizes.append(out.numel()))
    layer = decoder_layers(model)[0].register_forward_hook(lambda _m, _a, _o: sizes.append(0))
    pieces = score_rows(model, rows)
    hook.remove()
    layer.remove()
    assert pieces.num_tokens == whole.num_tokens
    assert pieces.nats == pytest.approx(whole.nats, rel=1e-6)
    assert len(sizes) - sizes.count(0) == 10
    assert max(sizes) <= 64 * 512
    assert sizes.count(0) == 1  # the layers run once


def test_a_long_document_advances_layer_by_layer(tiny_dense: Path):
    progress = StopsAfter(-1)
    score_rows(load_any(read_folder(tiny_dense)), [list(range(1, 200))], progress=progress)
    assert progress.steps == [66, 66, 67]


def test_refusals(text: Path, tiny_dense: Path, tmp_path: Path, tiny_layerwise_checkpoint: Path):
    with pytest.raises(UserError, match="max_tokens 0: allowed: 1 or more"):
        EvaluateOptions(tiny_dense, (text,), 0)
    with pytest.raises(UserError, match=r"text .*no such path"):
        evaluate(EvaluateOptions(tiny_dense, (tmp_path / "none.txt",)))
    with pytest.raises(UserError, match="not a model folder"):
        evaluate(EvaluateOptions(tmp_path, (text,)))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in tiny_layerwise_checkpoint.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    shard = damaged / "model-00002-of-00004.safetensors"
    weights = bytearray(shard.read_bytes())
    weights[-1] ^= 1
    shard.write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00004\.safetensors: damaged"):
        evaluate(EvaluateOptions(damaged, (text,)))


@pytest.mark.slow
def test_stories3m_reads_as_published(shared_folder: Path):
    text = shared_folder / "text" / "stories" / "ts_heldout.jsonl"
    result = evaluate(EvaluateOptions(shared_folder / "models" / "stories3M", (text,)))
    assert result["num_documents"] == 231
    assert result["perplexity"] == pytest.approx(4.748, abs=1e-3)
    assert result["bits_per_byte"] == pytest.approx(0.576, abs=1e-3)


def test_a_control_takes_over_and_is_compared(tiny_layerwise_checkpoint: Path):
    model = RoutedForCausalLM.from_pretrained(tiny_layerwise_checkpoint, dtype=torch.float32).eval()
    rows = [[1, *range(3, 120)]]
    oracle, chance = AgreementMeter(), AgreementMeter()
    own = score_rows(model, rows)
    assert score_rows(model, rows, oracle, control=OraclePolicy()).nats != own.nats
    assert oracle.figures()["control_vs_oracle"] == {"same_set": 1.0, "mean_overlap": 1.0}
    score_rows(model, rows, chance, control=RandomPolicy(0))
    assert 0.2 < chance.figures()["control_vs_oracle"]["mean_overlap"] < 0.47  # 2 of 6: a third expected
    assert score_rows(model, rows).nats == own.nats
