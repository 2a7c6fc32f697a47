"""A Mistral with a sliding window and a longer prompt, served on two hosts; a family we do not know is refused."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, DiffLlamaConfig, MistralConfig

from pregate.base.errors import UserError
from pregate.cluster.cli import main
from pregate.convert.conversion import convert
from pregate.convert.decouple import DecoupleOptions, decouple
from pregate.convert.options import ConvertOptions
from pregate.model.modeling import RoutedForCausalLM
from pregate.router.family import check_family
from tests.equality import Tally, reference_text, refuse_degenerate
from tests.router.serving import compare, engine_over, expert_hosts, serve

WINDOW = 12
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_model(config, tiny_dense, path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_dense / name, path)
    return path


@pytest.fixture(scope="module")
def mistral(tiny_dense, tiny_text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    dense = random_model(MistralConfig(**SIZES, head_dim=16, sliding_window=WINDOW), tiny_dense, folder / "dense")
    convert(ConvertOptions(dense, folder / "layerwise", 8, 2, 2, (tiny_text,), samples=4, sequence_length=96))
    decouple(DecoupleOptions(folder / "layerwise", folder / "path", (tiny_text,), steps=10, dim=16))
    return folder


def test_a_prompt_longer_than_the_window_is_held_to_the_reference(mistral, tmp_path):
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in (WINDOW * 4, WINDOW * 3 + 5, 7)]
    tally = Tally()
    with expert_hosts(mistral / "path", 2, tmp_path) as addresses:
        for routing in ("path", "layerwise"):
            model = RoutedForCausalLM.from_pretrained(mistral / routing).eval()
            references = [reference_text(model, p, 24) for p in prompts]
            refuse_degenerate(references)
            hosts = addresses if routing == "path" else []
            with engine_over(mistral / routing, hosts, step_tokens=20) as engine:
                compare(tally, routing, references, serve(engine, prompts, 24, together=True))
    print(tally)
    tally.check()


def test_the_window_matters_to_these_texts(mistral):
    """Without the window the reference would say something else, so the test above is not blind to it."""
    model = RoutedForCausalLM.from_pretrained(mistral / "path").eval()
    ids = torch.randint(3, 512, (1, WINDOW * 4), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        windowed = model(ids).logits[0, -1]
        model.parent.config.sliding_window = None
        assert not torch.allclose(windowed, model(ids).logits[0, -1], atol=1e-2)


def test_serve_refuses_an_unknown_family_by_name(tiny_dense, tiny_text, tmp_path, capsys):
    dense = random_model(DiffLlamaConfig(**SIZES), tiny_dense, tmp_path / "dense")
    convert(ConvertOptions(dense, tmp_path / "moe", 8, 2, 2, (tiny_text,), samples=2, sequence_length=64))
    capsys.readouterr()
    assert main(["serve", "--model", str(tmp_path / "moe"), "--hosts", "2"]) == 2
    error = capsys.readouterr().err
    assert "diffllama" in error
    assert error.count("\n") == 1
    with pytest.raises(UserError, match="diffllama"):
        check_family(DiffLlamaConfig(**SIZES))
