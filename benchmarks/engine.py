"""Tokens per second of the engine beside its peers, in one run: contenders in turn, equal threads, dtype and tokens.

    python -m benchmarks.engine --parent SMOLLM2 --vllm-python VENV/bin/python --llama-python VENV/bin/python \\
        --gguf FILE.gguf --out benchmarks/results/engine.json

Every contender is a process of its own (`contenders.py`) that stays for the whole run; each round asks all of them one
after another, so that what the machine does meanwhile falls on all alike. The best of the rounds counts, prefill
included, end-of-text ignored. The cuts are random ones (`random_cut.py`): what is measured does not depend on weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig

from benchmarks.deployment import Deployment, deployed
from benchmarks.engine_report import write_report
from benchmarks.random_cut import random_cut
from benchmarks.surroundings import ROOT, surroundings
from pregate.kernels.cpu.packed import onednn_product, product_of, why_no_fp16

#: (share of the FFN that runs in percent, shared, active) of 8 experts.
CUTS = ((100, 3, 5), (75, 3, 3), (50, 2, 2), (25, 1, 1))
PATIENCE_S = 600


class Contender:
    """A contender's process, of `contenders.py`'s `kind` with these parameters; it calls `enter` before all else. `run`
    gives its tokens per second for the first `count` prompts."""

    def __init__(
        self, name: str, python: str, kind: str, *parameters: str, enter: Callable[[], None] | None = None
    ) -> None:
        self.name, self.resident_bytes = name, 0
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(ROOT),
        }
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.contenders", kind, *parameters],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=ROOT,
            preexec_fn=enter,  # noqa: PLW1509 - no thread of ours runs beside
        )
        start_s = time.perf_counter()
        if self._line() != "ready":
            raise RuntimeError(f"{name} did not start")
        self.start_s = time.perf_counter() - start_s

    def _line(self) -> str:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], PATIENCE_S)[0]:
            raise RuntimeError(f"{self.name} says nothing for {PATIENCE_S} s")
        if not (line := self._process.stdout.readline().strip()):
            self._errors.seek(0)
            raise RuntimeError(f"{self.name} ended: {self._errors.read()[-2000:].decode(errors='replace')}")
        return line

    def run(self, prompts: list[str], num_new: int) -> float:
        assert self._process.stdin is not None
        print(json.dumps([prompts, num_new]), file=self._process.stdin, flush=True)
        seconds = json.loads(self._line())
        process = psutil.Process(self._process.pid)
        self.resident_bytes = sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
        return len(prompts) * num_new / seconds

    def close(self) -> None:
        if self._process.poll() is not None:
            return
        for process in (*psutil.Process(self._process.pid).children(recursive=True), self._process):
            process.kill()  # vLLM's workers outlive their parent, and would take time from those measured after
        self._process.wait(PATIENCE_S)


def measured_bounds() -> dict[str, float]:
    """What this machine gives one thread: bytes per second read, and fp32 operations per second of its fastest product
    (`@` is MKL's, which leaves half of AVX-512 unused on an AMD processor)."""
    torch.set_num_threads(1)
    data, square = torch.ones(1 << 27), torch.randn(2048, 2048).half().float()
    read = min(_seconds(data.sum) for _ in range(5))
    products = (onednn_product(square), product_of(square), lambda x: x @ square)
    product = min(_seconds(partial(multiply, square)) for multiply in products for _ in range(5))
    return {"bytes_per_s": data.nbytes / read, "flops_per_s": 2 * 2048**3 / product}


def decode_bounds(parent: Path, shares: Sequence[int], counts: Sequence[int], machine: dict[str, float]) -> Any:
    """New tokens per second by cut and count that reading weights and multiplying allow: no prefill, cache or Python.

    Weights take 2 bytes where fp16 products run. Of its routed experts a step of T tokens reads 1 - (1 - active)^T.
    """
    config = AutoConfig.from_pretrained(parent)
    width, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = 2 * width * (heads + groups) * (getattr(config, "head_dim", None) or width // heads)
    ffn, head = 3 * width * config.intermediate_size, width * config.vocab_size
    found: dict[str, dict[str, float]] = {}
    for share, shared, active in CUTS:
        routed = 8 - shared
        for count in counts if share in shares else ():
            visited = (shared + routed * (1 - (1 - active / routed) ** count)) / 8
            read, used = (config.num_hidden_layers * (attention + ffn * part) + head for part in (visited, share / 100))
            taken_s = (
                read * (4 if why_no_fp16() else 2) / machine["bytes_per_s"],
                2 * count * used / machine["flops_per_s"],
            )
            found.setdefault(f"engine, {share} %", {})[str(count)] = count / max(taken_s)
    return found


def _seconds(call: Any) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def lean_step(script: Path | None) -> dict[str, float]:
    """Tokens per second of a bare decode step, by share of the FFN and batch; nothing without its script."""
    if script is None:
        return {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=True)
    rows = [line.split() for line in out.stdout.splitlines() if line.startswith("packed")]
    return {f"{round(float(r[2]) * 100)} {r[3].removeprefix('T=').removesuffix(':')}": float(r[-2]) for r in rows}


def contenders(args: argparse.Namespace, work: Path, stack: ExitStack) -> list[Contender]:
    """Start every contender there is a program for."""
    here, parent = sys.executable, str(args.parent)
    found = []
    if args.vllm_python:
        found.append(Contender("vLLM, dense", args.vllm_python, "vllm", parent))
    if args.vllm_python and args.export:
        found.append(Contender("vLLM, our export, 75 %", args.vllm_python, "vllm", str(args.export)))
    found.append(Contender("transformers, dense", here, "transformers", parent))
    if args.gguf:
        found.append(Contender("llama.cpp, 4 bits", args.llama_python or here, "llama_cpp", str(args.gguf)))
    models = {
        share: random_cut(args.parent, work / f"cut{share}", experts=8, shared=shared, active=active)
        for share, shared, active in CUTS
        if share in args.shares
    }
    found += [Contender(f"engine, {share} %", here, "pregate_engine", str(path)) for share, path in models.items()]
    return found


@contextlib.contextmanager
def asked(args: argparse.Namespace, work: Path, num_hosts: int) -> Iterator[tuple[Contender, Deployment]]:
    """`pregate serve` on so many hosts, and who asks it. It ends with the block: an idle Ray takes time from others."""
    model = random_cut(args.parent, work / "cut75", experts=8, shared=3, active=3)
    with deployed(model, "--hosts", num_hosts, "--no-prefix-sharing", "--pin-cores") as deployment:
        contender = Contender(f"serve --hosts {num_hosts}, 75 %", sys.executable, "pregate_serve", deployment.target)
        start_s = time.perf_counter()
        contender.run(["Once"], 1)
        contender.start_s = deployment.start_s + time.perf_counter() - start_s
        yield contender, deployment
        contender.close()


class Results:
    """Tokens per second of every contender and count, what it holds and how long it took to start."""

    def __init__(self, prompts: list[str], args: argparse.Namespace) -> None:
        self._prompts, self._args = prompts, args
        self.found: dict[str, Any] = {k: {} for k in ("tokens_per_s", "resident_bytes", "start_s")}

    def race(self, running: Sequence[Contender], beside: str = "") -> None:
        """All of them in turn, round after round; `beside` is added to the names of those measured before."""
        for contender in running:
            contender.run(self._prompts[:2], 8)
        for _ in range(self._args.rounds):
            for count in self._args.counts:
                for contender in running:
                    name = contender.name
                    speed = contender.run(self._prompts[:count], self._args.new_tokens)
                    if beside and name in self.found["start_s"]:
                        name += beside
                    self.found["tokens_per_s"].setdefault(name, {}).setdefault(str(count), []).append(speed)
                    print(f"{name}: {count} requests, {speed:.1f} tokens/s", flush=True)
        for contender in running:
            self.found["resident_bytes"].setdefault(contender.name, contender.resident_bytes)
            self.found["start_s"].setdefault(contender.name, contender.start_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parent", type=Path, required=True, help="dense model folder")
    parser.add_argument("--shared-folder", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--vllm-python")
    parser.add_argument("--export", help="what `pregate export` made of a cut of the parent, 75 %% active")
    parser.add_argument("--llama-python")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--lean-step", type=Path, help="lean_step.py of the peers, where the parent is SmolLM2-135M")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--shares", type=int, nargs="+", default=[share for share, *_ in CUTS])
    parser.add_argument("--hosts", type=int, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--work", type=Path, help="where cuts are kept; a temporary folder if not given")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = args.shared_folder / "text" / "math" / "gsm8k-test.jsonl"
    questions = [json.loads(line)["question"] for line in text.read_text().splitlines()[: max(args.counts)]]
    prompts = [f"Question: {question}\nAnswer:" for question in questions]
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results: dict[str, Any] = {"bounds": measured_bounds(), "lean_step": lean_step(args.lean_step)}
        results |= {"stages_s": {}, "held_bytes": {}}
        results["decode_bounds"] = decode_bounds(args.parent, args.shares, args.counts, results["bounds"])
        running, speeds = contenders(args, work, stack), Results(prompts, args)
        for contender in running:
            stack.callback(contender.close)
        speeds.race(running)
        ours = [contender for contender in running if contender.name == "engine, 75 %"]
        for contender in set(running) - set(ours):
            contender.close()
        for num_hosts in args.hosts:
            with asked(args, work, num_hosts) as (served, deployment):
                speeds.race([*ours, served], f", beside --hosts {num_hosts}")
                results["stages_s"][served.name] = deployment.stages
                results["held_bytes"][served.name] = deployment.held_bytes()
    results |= speeds.found
    results |= surroundings("engine", ("transformers",))
    out = args.out or ROOT / "benchmarks" / "results" / "engine.json"
    out.write_text(json.dumps(results, indent=1) + "\n")
    write_report(results, out)


if __name__ == "__main__":
    main()
