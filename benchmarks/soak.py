"""Long loads on a `pregate serve` of one's own: does its memory stay flat, its queue bounded, its text the same?

    python -m benchmarks.soak overload --model examples/quartet-paths
    python -m benchmarks.soak tiers --model examples/quartet-paths

overload: a trace's requests, lengths clipped to the context, for `--minutes` at each of `--loads` times the capacity,
which is what 64 clients that each send their next request at once got before, from `--capacity-s` seconds on for as
long: what had begun before that time and ended in it stands for what had not ended when it was over. Refusals are
counted by status.
tiers: for `--minutes` four kinds of requests at once, with a quarter of the experts held and every step checked: long
prompts, long answers, texts that are drawn, and requests that are given up in the midst.

Memory is each role's share (PSS), sampled through the load and told fifth by fifth: allocators and caches fill first,
the engine's KV cache page by page as its blocks are first written. Four greedy texts are asked for before and after.
Writes results/soak_<part>.json and .md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.deployment import Deployment, deployed
from benchmarks.surroundings import ROOT, sentence, surroundings
from pregate.base.errors import PregateError
from pregate.cli.load.arrivals import Arrival, clipped, read_trace
from pregate.cli.load.outcome import figures
from pregate.cli.load.run import send
from pregate.cli.load.targets import opened
from pregate.client.client import Client

RESULTS = ROOT / "benchmarks" / "results"
#: Of the first-come-first-served queue that is put under load.
MAX_RUNNING, MAX_QUEUED = 64, 64
#: Clients of the measurement of capacity, and of the mixed load of each kind.
_CLIENTS, _CLIENTS_OF_KIND = 64, 4
_SAMPLE_EVERY_S, _TIMEOUT_S = 5.0, 120.0


class Watch(threading.Thread):
    """Samples memory and the queue until `stop`."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(daemon=True)
        self._deployment, self._ended = deployment, threading.Event()
        self.samples: list[dict[str, Any]] = []
        self.start()

    def run(self) -> None:
        with Client(self._deployment.target, timeout_s=30, retry_s=0) as client:
            while not self._ended.wait(_SAMPLE_EVERY_S):
                with contextlib.suppress(PregateError):
                    loads = client.loads()
                    self.samples.append(
                        {
                            "mb": {role: n / 1e6 for role, n in self._deployment.held_bytes().items()},
                            "running": loads.num_running,
                            "queued": loads.num_queued,
                            "units_held": sum(host.num_units for host in loads.hosts),
                        }
                    )

    def stop(self) -> dict[str, Any]:
        """Most of the queue; of each role's memory the mean of every fifth of the samples."""
        self._ended.set()
        self.join(60)
        assert len(self.samples) >= 5, "a load of some samples"
        ends = [len(self.samples) * part // 5 for part in range(6)]
        parts = [self.samples[start:stop] for start, stop in itertools.pairwise(ends)]
        roles = sorted({role for sample in self.samples for role in sample["mb"]})
        return {
            "samples": len(self.samples),
            "most_queued": max(sample["queued"] for sample in self.samples),
            "most_running": max(sample["running"] for sample in self.samples),
            "units_held": sorted({sample["units_held"] for sample in self.samples[ends[1] :]}),
            "memory_mb": {
                role: [round(float(np.mean([s["mb"].get(role, 0) for s in part])), 1) for part in parts]
                for role in roles
            },
        }


def texts(target: str) -> list[list[int]]:
    """The greedy answers to four prompts, one after another."""
    draw = random.Random(7)
    with Client(target, timeout_s=_TIMEOUT_S) as client:
        prompts = [[draw.randrange(3, 250) for _ in range(24)] for _ in range(4)]
        return [list(client.complete(prompt, 48, ignore_eos=True).token_ids) for prompt in prompts]


async def settled(target: str) -> dict[str, Any]:
    """Wait until nothing runs; what is still held then."""
    with Client(target, timeout_s=30) as client:
        for _ in range(600):
            loads = client.loads()
            if not (loads.num_running or loads.num_queued):
                break
            await asyncio.sleep(0.2)
    held = loads.kv_blocks - loads.kv_blocks_free
    return {"running": loads.num_running, "queued": loads.num_queued, "kv_blocks_held": held}


async def capacity(target: Any, arrivals: Sequence[Arrival], prompts: Sequence[list[int]], seconds: float) -> float:
    """Requests a second of clients that never pause, counted for `seconds` after as long a time of the same."""
    begin_s, number, ended = time.perf_counter() + seconds, iter(range(1 << 30)), 0
    end_s = begin_s + seconds

    async def client() -> None:
        nonlocal ended
        while time.perf_counter() < end_s:
            n = next(number) % len(arrivals)
            async for _ in target.generate(prompts[n], arrivals[n].output_tokens, _TIMEOUT_S):
                pass
            ended += begin_s <= time.perf_counter() < end_s

    await asyncio.gather(*(client() for _ in range(_CLIENTS)))
    return ended / seconds


def prompts_of(arrivals: Sequence[Arrival], vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocab_size, size=a.prompt_tokens).tolist() for a in arrivals]


async def overload(args: argparse.Namespace, deployment: Deployment) -> dict[str, Any]:
    """Measure capacity, then load for minutes below and above it."""
    trace = read_trace(args.trace)
    found: dict[str, Any] = {"max_running": MAX_RUNNING, "max_queued": MAX_QUEUED, "loads": []}
    async with opened(deployment.target, "grpc", "", None, None) as target:
        info = await target.info()
        arrivals, found["clipped"] = clipped(trace, info["max_context_length"], args.max_prompt, args.max_output)
        with Client(deployment.target) as client:
            found["kv_mb"] = client.loads().kv_bytes / 1e6
        prompts = prompts_of(arrivals[:1000], info["vocab_size"])
        rate = found["capacity"] = await capacity(target, arrivals[:1000], prompts, args.capacity_s)
        print(f"capacity {rate:.2f} requests/s", flush=True)
        for share in args.loads:
            due = arrivals[: round(share * rate * args.minutes * 60)]
            speed = due[-1].arrival_s / (args.minutes * 60)
            due = [Arrival(a.arrival_s / speed, a.prompt_tokens, a.output_tokens) for a in due]
            before, watch = await asyncio.to_thread(texts, deployment.target), Watch(deployment)
            outcomes = await send(target, due, prompts_of(due, info["vocab_size"]), _TIMEOUT_S)
            seen = await asyncio.to_thread(watch.stop)
            left = await settled(deployment.target)
            same = before == await asyncio.to_thread(texts, deployment.target)
            found["loads"].append(
                {"share": share, "speed": speed, **figures(outcomes, 1.0, 0.1), **seen, "left": left, "same_text": same}
            )
            print(json.dumps(found["loads"][-1]), flush=True)
    return found


async def mixed(args: argparse.Namespace, deployment: Deployment) -> dict[str, Any]:
    """Four kinds of requests at once until the time is over."""
    with Client(deployment.target) as client:
        info = client.model_info()
    end_s, ended = time.perf_counter() + args.minutes * 60, Counter[str]()
    stop, context = threading.Event(), info.max_context_length

    def ask(kind: str, seed: int) -> None:
        draw = random.Random(seed)
        with Client(deployment.target, timeout_s=_TIMEOUT_S) as client:
            while time.perf_counter() < end_s and not stop.is_set():
                length = draw.randrange(context // 2, context - 16) if kind == "long prompt" else draw.randrange(4, 48)
                prompt = [draw.randrange(3, info.vocab_size) for _ in range(length)]
                options: dict[str, Any] = {"seed": seed, "temperature": 0.9} if kind == "drawn" else {}
                limit = 8 if kind == "long prompt" else draw.randrange(32, 192)
                try:
                    with client.generate(prompt, limit, ignore_eos=True, **options) as generation:
                        for number, _ in enumerate(generation):
                            if kind == "given up" and number == limit // 8:
                                break
                    ended[kind] += 1
                except PregateError as error:
                    ended[f"{kind}: {type(error).__name__}"] += 1
                    stop.wait(0.5)

    kinds = ("long prompt", "long answer", "drawn", "given up")
    before, watch = await asyncio.to_thread(texts, deployment.target), Watch(deployment)
    threads = [
        threading.Thread(target=ask, args=(kind, 10 * n + i), daemon=True)
        for n, kind in enumerate(kinds)
        for i in range(_CLIENTS_OF_KIND)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join, args.minutes * 60 + _TIMEOUT_S)
    seen = await asyncio.to_thread(watch.stop)
    left = await settled(deployment.target)
    same = before == await asyncio.to_thread(texts, deployment.target)
    with Client(deployment.target) as client:
        info = client.model_info()
    hosts = [{name: getattr(h, name) for name in ("num_units", "hits", "misses", "stall_s")} for h in info.hosts]
    sums = {name: sum(getattr(h, name) for h in info.hosts) for name in ("prefetched_bytes", "wasted_bytes")}
    return {"ended": dict(ended), "steps": info.num_steps, "hosts": hosts, **sums, **seen, "left": left, "same": same}


def memory(seen: dict[str, Any]) -> str:
    return "; ".join(f"{role} {', '.join(f'{mb:.0f}' for mb in fifths)}" for role, fifths in seen["memory_mb"].items())


def overload_table(found: dict[str, Any]) -> str:
    lines = [
        f"Capacity {found['capacity']:.2f} requests/s; {MAX_RUNNING} run and {MAX_QUEUED} wait at most. Seconds.", "",
        "| load | sent | answered | otherwise | first token p50, p99 | answer p50, p99 | most queued | same text |",
        "| --: | --: | --: | --- | --: | --: | --: | --- |",
    ]  # fmt: skip
    for x in found["loads"]:
        others = {k: v for k, v in x["requests"].items() if k not in ("sent", "answered")}
        said = ", ".join(f"{k} {v}" for k, v in others.items()) or "none"
        first, whole = (
            f"{x[name]['p50'] / 1e3:.2f}, {x[name]['p99'] / 1e3:.2f}"
            for name in ("time_to_first_token_ms", "end_to_end_ms")
        )
        lines.append(
            f"| {x['share']:g} | {x['requests']['sent']} | {x['requests']['answered']} | {said} |"
            f" {first} | {whole} | {x['most_queued']} | {'yes' if x['same_text'] else 'NO'} |"
        )
    rows = [f"- {x['share']:g}: {memory(x)}; left {x['left']}" for x in found["loads"]]
    told = f"Memory in MB, fifth by fifth of a load (KV cache, once all of it was written, {found['kv_mb']:.0f} MB):"
    return "\n".join([*lines, "", told, "", *rows])


def tiers_table(found: dict[str, Any]) -> str:
    ended = ", ".join(f"{kind} {count}" for kind, count in sorted(found["ended"].items()))
    hosts = "; ".join(
        f"host {n}: {h['num_units']} units, hits {h['hits']}, misses {h['misses']}, waited {h['stall_s']:.0f} s"
        for n, h in enumerate(found["hosts"])
    )
    return "\n".join(
        [
            f"- Requests: {ended}; {found['steps']} steps, each checked.",
            f"- {hosts}.",
            f"- Fetched ahead {found['prefetched_bytes'] / 1e6:.0f} MB, in vain {found['wasted_bytes'] / 1e6:.0f} MB.",
            f"- Units held at any time: {', '.join(map(str, found['units_held']))}.",
            f"- Memory in MB, each fifth of the time in turn: {memory(found)}.",
            f"- Afterwards: {found['left']}; greedy texts {'the same' if found['same'] else 'DIFFER'}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("overload", "tiers"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="of each load; 10 of overload, 30 of tiers")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--trace", type=Path, default=ROOT.parent / "shared" / "traces" / "azure2023_conv.csv")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.8, 1.5])
    parser.add_argument("--max-prompt", type=int, default=384)
    parser.add_argument("--max-output", type=int, default=128)
    parser.add_argument("--capacity-s", type=float, default=60)
    parser.add_argument("--resident", type=float, default=0.25)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    tiers = args.part == "tiers"
    args.minutes = args.minutes or (30 if tiers else 10)
    around = surroundings("soak", ("ray", "grpcio"))
    arguments: tuple[object, ...] = ("--hosts", args.hosts, "--max-running", MAX_RUNNING, "--max-queued", MAX_QUEUED)
    if tiers:
        arguments += ("--resident-experts", args.resident, "--check-steps")
    with deployed(args.model.resolve(), *arguments) as deployment:
        found = asyncio.run((mixed if tiers else overload)(args, deployment))
        found["left_behind"] = deployment.stop()
    file = args.out / f"soak_{args.part}.json"
    file.write_text(json.dumps({"around": around, "minutes": args.minutes} | found, indent=1) + "\n")
    what = f"Mixed load with {args.resident:g} of the experts held" if tiers else "Below and above capacity"
    said = tiers_table(found) if tiers else overload_table(found)
    left = f"Left behind after the end: {found['left_behind'] or 'nothing'}."
    where = f"{args.model.name}, {args.hosts} expert host, {args.minutes:g} minutes of each load. {sentence(around)}."
    file.with_suffix(".md").write_text(f"# {what}\n\n{where}\n\n{said}\n\n{left}\n")
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
