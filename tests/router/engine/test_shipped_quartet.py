"""The tuned checkpoint that ships with the repository: two hosts serve, and paths are, what the reference has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from pregate.model.checkpoint import read_manifest
from pregate.model.modeling import RoutedForCausalLM
from tests.equality import reference_texts
from tests.router.serving import engine_in_process, hold

SHIPPED = Path(__file__).resolve().parents[3] / "examples" / "quartet-paths"
NUM_TOKENS = 24
TEXTS = (
    "It was a cold evening in November, and Mr. Darcy",
    "The natural price of labour is",
    "Question: Tom has 12 apples. He gives 5 apples to Mary. How many apples does Tom have left?\nAnswer:",
)


@pytest.fixture(scope="module")
def model() -> RoutedForCausalLM:
    return RoutedForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()  # as the hosts compute


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_hosts_serve_what_the_reference_writes(model: RoutedForCausalLM, prompts: list[list[int]], num_hosts: int):
    references = reference_texts(model, prompts, NUM_TOKENS)
    with engine_in_process(SHIPPED, num_hosts) as engine:
        hold(engine, "shipped", references)


def test_paths_are_the_same_whole_and_token_by_token(model: RoutedForCausalLM, prompts: list[list[int]]):
    for prompt in prompts:
        state, parts = model.path_computer.new_state(), []
        for token in prompt:
            (path,), (state,) = model.path_computer.extend([state], [[token]])
            parts.append(path.ids)
        assert (np.concatenate(parts) == model.paths(prompt).ids).all()


def test_it_was_decoupled_and_tuned_and_is_small():
    manifest = read_manifest(SHIPPED)
    assert manifest.method == "cmoe+decouple+tune"
    tuned = manifest.figures["tune"]
    assert tuned["validation_perplexity_after"] < tuned["validation_perplexity_before"]
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 16 * 2**20
