"""Tokens a second with fewer experts in memory than a model has: lookahead, LRU on demand, all resident; by path.

    python -m benchmarks.offload --model CHECKPOINT [--bandwidth BYTES] [--resident 0.25 0.5 0.75 1]

CHECKPOINT has exact paths; one with random weights (`benchmarks.random_cut`) has the shape and the cost of a real one.
The engine and its one host share this process, and a thread fetches ahead. `--bandwidth` holds reads of experts to so
many bytes a second, all threads together, like a disk that slow, which goes on by itself with what it is told to read
ahead; without it they come from the system's cache of the files, or from the disk. Two kinds of work: prompts of 512
tokens (one less than the context, if that is shorter), and decoding 1, 4 and 16 requests at once. Policy `path` is
lookahead with steps chosen by path (`--batching path`). A run's bound is the longer of what all resident took and its
bytes at the bandwidth. With `--resident 1` there are slots for all. Writes results/offload.json and .md.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.surroundings import sentence, surroundings
from pregate.base.options import Dtype
from pregate.cluster.placement import place
from pregate.model.checkpoint import CheckpointReader
from pregate.model.quiet import quiet_transformers
from pregate.router.engine.build import build_engine
from pregate.router.engine.engine import Engine
from pregate.router.engine.options import EngineOptions
from pregate.router.link.messages import SamplingParams, SubmitRequest
from pregate.workers.client.host_client import InProcessClient
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import HostOptions
from pregate.workers.host.slots import Unit as Weights

PROMPT_TOKENS = 512


class ThrottledReader:
    """Reads what `reader` reads as from a disk of `bandwidth` bytes a second, once `begin` was called: one unit after
    another, those it was told to read ahead as well, with which it goes on while nobody waits."""

    def __init__(self, reader: CheckpointReader, bandwidth: float | None) -> None:
        self._reader, self._bandwidth = reader, bandwidth
        self._lock, self._free_s, self._begun = threading.Lock(), 0.0, False
        self._there_s: dict[tuple[int, int], float] = {}  # when what is read ahead has been read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def begin(self) -> None:
        self._begun = True

    def read_ahead(self, layer: int, expert: int) -> None:
        self._reader.read_ahead(layer, expert)
        with self._lock:
            if (layer, expert) not in self._there_s:
                self._there_s[layer, expert] = self._read_s(layer)

    def read_unit(self, layer: int, expert: int, out: Weights | None = None) -> Weights:
        with self._lock:
            there_s = self._there_s.pop((layer, expert), None) or self._read_s(layer)
        unit = self._reader.read_unit(layer, expert, out)
        time.sleep(max(0.0, there_s - time.monotonic()))
        return unit

    def _read_s(self, layer: int) -> float:
        """When a unit has been read that is asked for now."""
        if self._bandwidth is None or not self._begun:
            return 0.0
        self._free_s = max(self._free_s, time.monotonic()) + self._reader.unit_bytes(layer) / self._bandwidth
        return self._free_s


def load(
    model: Path,
    share: float | None,
    lookahead: bool,
    bandwidth: float | None = None,
    dtype: Dtype = "float32",
    kv_cache_memory: float | None = None,
    max_running: int = 16,
    batching: str = "fifo",
) -> tuple[Engine, ExpertHost]:
    """An engine and its host in this process, with that share of the experts in slots; None: nothing is said of it."""
    torch.set_num_threads(1)
    quiet_transformers()
    reader = ThrottledReader(CheckpointReader(model), bandwidth)
    placement = place([cut.num_routed for cut in reader.config.cuts], 1, "linear")
    resident = len(placement.units_of(0)) if share == 1 else share
    options = HostOptions(resident_experts=resident, lookahead=lookahead, dtype=dtype)
    host = ExpertHost(reader, placement.units_of(0), options, beside_engine=True)  # pyright: ignore[reportArgumentType]
    engine_options = EngineOptions(
        model=str(model),
        dtype=dtype,
        prefix_sharing=False,
        max_running=max_running,
        kv_cache_memory=kv_cache_memory,
        batching=batching,  # pyright: ignore[reportArgumentType]
        max_batching_delay=20.0,
    )
    engine = build_engine(engine_options, [InProcessClient(host)], placement.copies)
    reader.begin()
    return engine, host


def run(
    engine: Engine, host: ExpertHost, num_requests: int, num_prompt: int, num_new: int, seed: int
) -> dict[str, Any]:
    """Run requests together; of decoding only the steps after the prompts count."""
    random = np.random.default_rng(seed)
    vocab = engine.config.text_config.vocab_size
    for n in range(num_requests):
        prompt = tuple(random.integers(3, vocab, num_prompt).tolist())
        engine.submit(SubmitRequest(f"{seed}-{n}", prompt, SamplingParams(num_new, ignore_eos=True)))
    decoding = num_new > 1
    while decoding and any(s.num_generated == 0 for s in (*engine.scheduler.running, *engine.scheduler.waiting)):
        engine.step()
    before, begun_s, num_tokens = host.status(), time.perf_counter(), 0
    while engine.has_work:
        num_tokens += sum(len(getattr(event, "token_ids", ())) for event in engine.step())
    taken_s, after = time.perf_counter() - begun_s, host.status()
    part = {
        key: after[key] - before[key] for key in ("read_bytes", "prefetched_bytes", "wasted_bytes", "hits", "misses")
    }
    return {
        "tokens": num_tokens if decoding else num_requests * num_prompt,
        "seconds": taken_s,
        "stall_s": after["stall_s"] - before["stall_s"],
        **part,
    }


def measure(model: Path, share: float, policy: str, args: argparse.Namespace) -> dict[str, Any]:
    batching = "path" if policy == "path" else "fifo"
    held = None if policy == "-" else share
    running = max(16, *args.decode)
    engine, host = load(model, held, policy != "lru", args.bandwidth, max_running=running, batching=batching)
    found = {}
    num_prompt = min(PROMPT_TOKENS, engine.context - 1)
    works = [(f"prefill {num_prompt}", args.prompts, num_prompt, 1)]
    works += [(f"decode {n}", n, 8, args.new_tokens + 1) for n in args.decode]
    for name, *sizes in works:
        run(engine, host, 1, 16, 2, seed=0)  # warm
        found[name] = run(engine, host, *sizes, seed=1)
    host.close()
    return found


def markdown(result: dict[str, Any]) -> str:
    lines = ["# Experts that come and go", "", result["setting"], ""]
    lines += [
        "| work | resident | policy | tokens/s | of all resident | waiting | hit rate | read MB | wasted | of bound |"
    ]
    lines += ["| --- | --: | --- |" + " --: |" * 7]
    full = result["cases"][0]["work"]
    for work in full:
        for case in result["cases"]:
            row = case["work"][work]
            rate, best = row["tokens"] / row["seconds"], full[work]["tokens"] / full[work]["seconds"]
            bound_s = full[work]["seconds"]
            if result["bandwidth"] is not None:
                bound_s = max(bound_s, row["read_bytes"] / result["bandwidth"])
            hits = row["hits"] / max(row["hits"] + row["misses"], 1) if case["share"] < 1 else 1.0
            wasted = row["wasted_bytes"] / max(row["prefetched_bytes"], 1)
            lines.append(
                f"| {work} | {100 * case['share']:.0f} % | {case['policy']} | {rate:.2f} | {rate / best:.2f} "
                f"| {100 * row['stall_s'] / row['seconds']:.0f} % | {100 * hits:.0f} % | {row['read_bytes'] / 1e6:.0f} "
                f"| {100 * wasted:.1f} % | {bound_s / row['seconds']:.2f} |"
            )
    return "\n".join(lines) + f"\n\n{sentence(result['surroundings'])}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint with exact paths")
    parser.add_argument("--bandwidth", type=float, help="bytes a second that experts are read at")
    parser.add_argument("--resident", type=float, nargs="*", default=[0.25, 0.5, 0.75, 1])
    parser.add_argument("--policies", nargs="*", default=["lookahead", "lru"], choices=("lookahead", "lru", "path"))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 4, 16], help="requests at once")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--beside", default="", help="what else ran on the machine, for the record")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="offload")
    args = parser.parse_args()
    speed = "unthrottled" if args.bandwidth is None else f"read at {args.bandwidth / 1e6:g} MB/s"
    setting = f"{args.model.name}, experts {speed}; one thread, engine and host in one process. {args.beside}".strip()
    cases = []
    shares = [(share, policy) for share in args.resident for policy in args.policies[: None if share < 1 else 1]]
    for share, policy in [(1.0, "-"), *shares]:
        cases.append({"share": share, "policy": policy, "work": measure(args.model, share, policy, args)})
        print(
            share, policy, {work: round(row["tokens"] / row["seconds"], 2) for work, row in cases[-1]["work"].items()}
        )
        result = {"setting": setting, "bandwidth": args.bandwidth, "cases": cases}
        result["surroundings"] = surroundings("offload", ["transformers"])
        (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / f"{args.name}.md").write_text(markdown(result))
    print((args.out / f"{args.name}.md").read_text())


if __name__ == "__main__":
    main()
