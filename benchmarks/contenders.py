"""One contender of `benchmarks.engine`, in a process of its own, which may be of another virtual environment.

    python -m benchmarks.contenders KIND MODEL [...]

What else a kind takes are the parameters of its function, as text. Every line on standard input is a JSON list of
prompts and a number of new tokens; the answer is a line with the seconds from the first request to the last token,
greedy, end-of-text ignored.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Run = Callable[[list[str], int], None]


def local_engine(model: str, expert_ffn: str = "auto") -> Any:
    """An engine with its host in the same process, one thread, every prompt computed whole."""
    import torch

    from pregate.base.huge_pages import collapse
    from pregate.cluster.placement import place
    from pregate.model.checkpoint import CheckpointReader
    from pregate.router.engine.build import build_engine
    from pregate.router.engine.options import EngineOptions
    from pregate.workers.client.host_client import InProcessClient
    from pregate.workers.host.host import ExpertHost
    from pregate.workers.host.options import HostOptions

    torch.set_num_threads(1)
    reader = CheckpointReader(model)
    placement = place([cut.num_routed for cut in reader.config.cuts], 1)
    host = ExpertHost(reader, placement.units_of(0), HostOptions(expert_ffn=expert_ffn))
    engine = build_engine(EngineOptions(model=model, prefix_sharing=False), [InProcessClient(host)], placement.copies)
    collapse()
    return engine


def pregate_engine(model: str) -> Run:
    """The engine alone, its host in the same process: no sockets, no detokenising."""
    return _asking(local_engine(model), model)


def pregate_tiers(model: str, resident: str, policy: str) -> Run:
    """The same in bfloat16 where the CPU has it, with that share of the experts in slots; lookahead or lru."""
    import torch

    from benchmarks.offload import load
    from pregate.kernels.cpu.ffn import why_not_dtype

    dtype = "float32" if why_not_dtype(torch.bfloat16) else "bfloat16"
    engine, _ = load(Path(model), float(resident), policy == "lookahead", dtype=dtype, kv_cache_memory=64 << 20)
    return _asking(engine, model)


def _asking(engine: Any, model: str) -> Run:
    from pregate.model.tokenizer import read_tokenizer
    from pregate.router.link.messages import SamplingParams, SubmitRequest

    tokenizer = read_tokenizer(Path(model))

    def run(prompts: list[str], num_new: int) -> None:
        for number, prompt in enumerate(prompts):
            sampling = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
            engine.submit(SubmitRequest(str(number), tuple(tokenizer.encode(prompt).ids), sampling, None))
        while engine.has_work:
            engine.step()

    return run


def pregate_serve(target: str) -> Run:
    """A running `pregate serve`, asked over gRPC, one thread a request."""
    from pregate.client.client import Client

    client = Client(target)

    def run(prompts: list[str], num_new: int) -> None:
        def ask(prompt: str) -> None:
            client.complete(prompt, num_new, temperature=0.0, ignore_eos=True)

        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(ask, prompts))

    return run


def vllm(model: str) -> Run:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    context = min(1024, json.loads((Path(model) / "config.json").read_text())["max_position_embeddings"])
    engine = LLM(model=model, dtype="float32", max_model_len=context, max_num_seqs=64, enable_prefix_caching=False)

    def run(prompts: list[str], num_new: int) -> None:
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True), use_tqdm=False)

    return run


def transformers(model: str, dtype: str = "float32", threads: str = "1") -> Run:
    """`generate` on one batch, padded to its longest prompt. With `dtype` "auto" weights stay mapped to their files."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(int(threads))
    tokenizer: Any = AutoTokenizer.from_pretrained(model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    @torch.inference_mode()
    def run(prompts: list[str], num_new: int) -> None:
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        loaded.generate(**batch, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False)

    return run


def llama_cpp(model: str, num_parallel: str = "64", threads: str = "1") -> Run:
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_gpu_layers = model, int(num_parallel), 0
    params.n_ctx = params.n_parallel * 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    server = xllamacpp.Server(params)

    def run(prompts: list[str], num_new: int) -> None:
        def ask(prompt: str) -> None:
            body = {"prompt": prompt, "max_tokens": num_new, "temperature": 0, "ignore_eos": True}
            server.handle_completions(body | {"cache_prompt": False})

        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(ask, prompts))

    return run


KINDS = {f.__name__: f for f in (pregate_engine, pregate_tiers, pregate_serve, vllm, transformers, llama_cpp)}


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries and their processes print is no answer
    run = KINDS[sys.argv[1]](*sys.argv[2:])
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        prompts, num_new = json.loads(line)
        start_s = time.perf_counter()
        run(prompts, num_new)
        print(time.perf_counter() - start_s, file=out, flush=True)


if __name__ == "__main__":
    main()
