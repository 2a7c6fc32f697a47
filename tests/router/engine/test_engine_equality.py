"""Whatever comes when, and however little room there is, every text is that of the reference model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pregate.model.checkpoint import CheckpointReader
from pregate.model.modeling import RoutedForCausalLM
from pregate.router.engine.engine import Engine
from pregate.router.engine.sampling import scores
from pregate.router.link.messages import SamplingParams, SubmitRequest, TokensEvent
from tests.equality import ReferenceText, Tally, reference_texts
from tests.router.serving import engine_of, hosts_here

NUM_NEW = 24
SEED = 5
DRAWN = SamplingParams(NUM_NEW, 1.0, seed=SEED, ignore_eos=True)
#: Prompts with equal beginnings and without, shorter and longer than a block.
PROMPTS = [[1, *range(30, 30 + n)] for n in (3, 40, 52)] + [[7, *range(90, 90 + n, 2)] for n in (30, 75)]


#: Checkpoints of one's own, a real model's for one, to be held to the same (folders, as in PATH).
OTHERS = [folder for folder in os.environ.get("PREGATE_CHECKPOINTS", "").split(os.pathsep) if folder]


@pytest.fixture(scope="module", params=["layerwise", "path", *OTHERS])
def checkpoint(request, layerwise_checkpoint, path_checkpoint):
    return {"layerwise": layerwise_checkpoint, "path": path_checkpoint}.get(request.param) or Path(request.param)


def token_bytes(checkpoint: Path) -> int:
    """Bytes of the KV cache that a token takes."""
    text = CheckpointReader(checkpoint).config.text_config
    heads = text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return 2 * text.num_hidden_layers * heads * 4


@pytest.fixture(scope="module")
def references(checkpoint) -> dict[str, list[ReferenceText]]:
    """The greedy texts, and those that are drawn."""
    model = RoutedForCausalLM.from_pretrained(checkpoint).float().eval()
    drawn = reference_texts(model, PROMPTS, NUM_NEW, lambda logits_V, at: scores(logits_V, DRAWN, SEED, at))
    return {"greedy": reference_texts(model, PROMPTS, NUM_NEW), "drawn": drawn}


def play(engine: Engine, seed: int) -> dict[str, list[int]]:
    """Every prompt twice, and sampled neighbours of which half are cancelled, arriving at random."""
    generator = np.random.default_rng(seed)
    todo = [(f"{n}-{copy}", n, 0.0) for n in range(len(PROMPTS)) for copy in range(2)]
    todo += [(f"noise-{n}", n, 1.0) for n in range(len(PROMPTS))]
    generator.shuffle(todo)
    texts: dict[str, list[int]] = {}
    for _ in range(5000):
        if todo and generator.random() < 0.4:
            name, prompt, temperature = todo.pop()
            sampling = replace(DRAWN, temperature=float(temperature))
            engine.submit(SubmitRequest(str(name), tuple(PROMPTS[int(prompt)]), sampling))
        for event in engine.step():
            if isinstance(event, TokensEvent):
                texts.setdefault(event.request_id, []).extend(event.token_ids)
                if event.request_id in ("noise-0", "noise-1") and len(texts[event.request_id]) == 5:
                    engine.cancel(event.request_id)
        if not todo and not engine.has_work:
            return texts
    raise AssertionError("the engine did not come to an end")


@pytest.mark.parametrize(
    ("num_hosts", "step_tokens", "tokens", "sharing"),
    [(1, 1, 4096, True), (1, 7, 160, True), (2, 40, 144, False), (1, 512, 112, True), (3, 512, 4096, True)],
)
def test_texts_are_the_references_under_random_arrivals(
    checkpoint, references, num_hosts, step_tokens, tokens, sharing
):
    options = {
        "step_tokens": step_tokens,
        "kv_cache_memory": tokens * token_bytes(checkpoint),
        "prefix_sharing": sharing,
    }
    with engine_of(checkpoint, hosts_here(checkpoint, num_hosts), max_running=8, check_steps=True, **options) as engine:
        rounds = [play(engine, seed) for seed in range(2)]
        info = engine.info()
        engine.scheduler.allocator.check([])
    assert (info["num_preempted"] > 0) == (tokens < 1000), "a small cache preempts, a large one does not"
    assert (info["prefix_tokens"] > 0) == sharing
    tally = Tally()
    for texts in rounds:
        for n, reference in enumerate(references["greedy"]):
            for copy in range(2):
                tally.compare_text(f"prompt {n}", reference, texts[f"{n}-{copy}"])
        for n, reference in list(enumerate(references["drawn"]))[2:]:
            tally.compare_text(f"drawn {n}", reference, texts[f"noise-{n}"])
        assert len(texts["noise-0"]) == 5
    tally.check()
