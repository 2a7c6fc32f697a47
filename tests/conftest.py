"""Models every test may use: a tiny dense Llama with a real tokenizer, and checkpoints made from it the real way."""

from __future__ import annotations

import logging
import os
import signal
import tempfile

# Before torch is imported, and for every process a test starts, whatever the shell says: with another number of threads
# sums differ in their last bits, and tests that compare two runs fail now and then.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
# Where hashes of checkpoints are remembered: not among those of whoever runs the tests.
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), "pregate-tests-cache")
# What a script starts in the background ignores Ctrl-C, and so does all it starts; tests press Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pregate.base import log
from pregate.cluster import local_ray
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.model.quiet import quiet_transformers
from tests.families import FAMILIES, make_checkpoints, save_random
from tests.random_checkpoints import make_checkpoint, make_unit_checkpoint
from tests.sharing_out import pytest_collection_modifyitems, pytest_xdist_make_scheduler  # noqa: F401 (hooks)

# Before Ray is imported anywhere: it reads its environment once, and every process of a test must agree on it.
local_ray.prepare_environment()
quiet_transformers()

PARAGRAPHS = """\
The harbour lay quiet before the storm. Three boats had come in at noon, and the fishermen mended their nets on the
wall, talking of prices and of the weather. A boy ran along the quay with a basket of bread, calling to his sister.

"How many loaves are left?" she asked. He counted them twice: seven, and one that was broken. Seven loaves at four
pence each make twenty-eight pence, which was enough for the oil but not for the lamp.

Of all the arts that men have learned, the oldest is to wait. The farmer waits for rain, the sailor for wind, and the
judge for the truth; yet none of them is idle, since to wait well is to be ready.

O wind that walks upon the water, tell the hills what thou hast heard: a bell beneath the grey waves ringing, and the
crying of a bird. The night came down, the lamps were lighted, and the sea forgot the word.

In the year that followed, the town voted to build a second pier. Its cost was reckoned at 1,200 pounds; the old men
shook their heads, the young men carried stones, and by October the first ship from the north was moored there.
"""


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder `shared` beside the repository (models and texts that are not ours to commit), or a skip."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "models" / "stories3M").is_dir():
        pytest.skip(f"{folder} holds no models and texts")
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .txt file of five paragraphs in five manners."""
    path = tmp_path_factory.mktemp("text") / "harbour.txt"
    path.write_text(PARAGRAPHS * 4, encoding="utf-8")
    return path


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PARAGRAPHS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=256
    )


@pytest.fixture(scope="session")
def tiny_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama: hidden 64, FFN 128, 3 layers, 4 heads over 2, vocabulary 512, context 256, eos id 2.

    Weights are large enough (standard deviation 0.15) that greedy texts of different prompts differ.
    """
    path = tmp_path_factory.mktemp("models") / "tiny-dense"
    tokenizer = _tokenizer(512)
    assert len(tokenizer) == 512
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_layerwise_checkpoint(tiny_dense: Path, tiny_text: Path) -> Path:
    """The tiny model converted S2A2E8 with linear gates."""
    out = tiny_dense.parent / "tiny-layerwise"
    convert(ConvertOptions(tiny_dense, out, 8, 2, 2, (tiny_text,), samples=8, sequence_length=128))
    return out


@pytest.fixture(scope="session")
def tiny_path_checkpoint(tiny_layerwise_checkpoint: Path, tiny_text: Path) -> Path:
    """The tiny layer-wise checkpoint decoupled with few steps: its paths are exact."""
    out = tiny_layerwise_checkpoint.parent / "tiny-path"
    decouple(DecoupleOptions(tiny_layerwise_checkpoint, out, (tiny_text,), steps=30, dim=32))
    return out


@pytest.fixture(scope="session")
def tiny_read_checkpoint(tiny_layerwise_checkpoint: Path, tiny_text: Path) -> Path:
    """The tiny layer-wise checkpoint whose paths are known after one of its three layers."""
    out = tiny_layerwise_checkpoint.parent / "tiny-read"
    decouple(DecoupleOptions(tiny_layerwise_checkpoint, out, (tiny_text,), steps=30, dim=32, read_layers=1))
    return out


@pytest.fixture(scope="session")
def family_folder(tiny_dense: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a family of tests/families.py: `dense`, `layerwise`, `path`; made when first asked for."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family.replace(" ", "-"))
            make_checkpoints(save_random(FAMILIES[family], tiny_dense, made[family] / "dense"), tiny_text)
        return made[family]

    return folder_of


@pytest.fixture(scope="session")
def layerwise_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("layerwise") / "tiny", "layerwise")


@pytest.fixture(scope="session")
def path_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("path") / "tiny", "path")


@pytest.fixture(scope="session")
def unit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_unit_checkpoint(tmp_path_factory.mktemp("workers") / "checkpoint")


@pytest.fixture(autouse=True)
def own_log():
    """After a test that called `log.configure`, as `pregate serve` does, what is logged goes where it went before."""
    logger = logging.getLogger("pregate")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])
    log.request_id.set("")
