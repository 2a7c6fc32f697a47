"""Every family that converts, served by two hosts and held to its reference; or refused by `serve` by name."""

import pytest
import torch
from transformers import DiffLlamaConfig, Qwen3_5TextConfig, StableLmConfig

from pregate.base.errors import UserError
from pregate.cli.main import main
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.model import CheckpointReader, RoutedForCausalLM
from pregate.router.engine.family import check_family
from pregate.router.link.messages import SamplingParams, SubmitRequest
from tests.equality import reference_texts
from tests.families import FAMILIES, SIZES, WINDOW, save_random
from tests.router.serving import HostProcesses, engine_over, hold

NUM_TOKENS = 24
WINDOWED = [name for name, config in FAMILIES.items() if getattr(config, "sliding_window", None) == WINDOW]
UNSERVED = {
    "diffllama": DiffLlamaConfig(**SIZES),
    "stablelm": StableLmConfig(**SIZES),
    "qwen3_5_text": Qwen3_5TextConfig(**SIZES, layer_types=["linear_attention", "full_attention"]),
}


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    processes = HostProcesses(2, tmp_path_factory.mktemp("ipc"))
    yield processes
    processes.close()


def prompts():
    """Two prompts longer than the window and one that is shorter."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 512, (n,), generator=generator).tolist() for n in (WINDOW * 4, WINDOW * 3 + 5, 7)]


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["path", "layerwise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_hosts_equal_the_reference(family, routing, family_folder, two_hosts):
    path = family_folder(family) / routing
    check_family(CheckpointReader(path).config.text_config)
    model = RoutedForCausalLM.from_pretrained(path).eval()
    references = reference_texts(model, prompts(), NUM_TOKENS)
    with engine_over(path, two_hosts.serve(path), step_tokens=20) as engine:
        tally = hold(engine, f"{family} {routing}", references, together=(True,))
        assert all(client.stats.groups for client in engine.exchange.clients), "both hosts were asked"
    print(f"{family}, {routing}: {tally}")


@pytest.mark.parametrize("family", WINDOWED)
def test_the_window_matters_to_these_texts(family, family_folder):
    """Without the window the reference would say something else, so the test above is not blind to it."""
    model = RoutedForCausalLM.from_pretrained(family_folder(family) / "path").eval()
    ids = torch.tensor(prompts()[:1])
    with torch.no_grad():
        windowed = model(ids).logits[0, -1]
        model.parent.config.sliding_window = 10 * WINDOW
        assert not torch.allclose(windowed, model(ids).logits[0, -1], atol=1e-2)


def test_longrope_is_served_up_to_where_it_would_change_earlier_tokens(family_folder):
    path = family_folder("phi3 longrope") / "path"
    with engine_over(path, []) as engine:
        assert engine.context == 128
        with pytest.raises(UserError, match="128"):
            engine.submit(SubmitRequest("long", (5,) * 129, SamplingParams(4)))


@pytest.mark.parametrize("family", UNSERVED)
def test_serve_refuses_the_others_by_name(family, tiny_dense, tiny_text, tmp_path, capsys):
    dense = save_random(UNSERVED[family], tiny_dense, tmp_path / "dense")
    convert(ConvertOptions(dense, tmp_path / "moe", 8, 2, 2, (tiny_text,), samples=2, sequence_length=48))
    capsys.readouterr()
    assert main(["serve", "--model", str(tmp_path / "moe"), "--hosts", "2"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"pregate: model family '{family}' cannot be served")
    assert error.count("pregate:") == 1
