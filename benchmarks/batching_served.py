"""Batches by path on real hosts: one trace against `pregate serve` under each policy, as `batching.py` simulates it.

    python -m benchmarks.batching_served --model CHECKPOINT [CHECKPOINT ...] --shared-folder ../shared
    python -m benchmarks.batching_served --one-index SMOLLM2 --work DIR --shared-folder ../shared --resident 0.25

With `--one-index` a dense model is cut by chance into seven experts and a shared one, with one index for all layers:
experts that are dear to load, on paths that nobody trained.

Arrivals and lengths are the Azure conversation trace's, clipped to `--prompt-tokens` and 128, prompts are cut from all
six text folders with a fixed seed, and every policy is sent the same ones, to hosts of its own: all at once first
(load 0 in the table), which says of `fifo`, the first one, what it bears, and then at `--loads` of that. Hosts are
processes that share this machine's cores, with one torch thread each, 0 of them: in the engine; nothing of earlier
prompts is kept. Writes results/batching_served.json and .md.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.deployment import deployed
from benchmarks.random_cut import random_cut
from benchmarks.served_peers import bench
from benchmarks.surroundings import ROOT, sentence, surroundings

POLICIES = ("fifo", "path", "decode-first", "prefill-first")
#: Requests a second that come as good as at once.
_FLOOD = 1000.0
HEAD = """| model | hosts | resident | load | policy | units a step | tokens a step | tokens/s | p50, p95 | hits |
| --- | --: | --: | --: | --- | --: | --: | --: | --: | --: |"""


def measure(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Fill in the rows, one deployment after the other."""
    for model, hosts, resident in product(args.model, args.hosts, args.resident):
        sent, rate = argparse.Namespace(**vars(args) | {"parent": model}), 0.0  # its tokenizer cuts the prompts
        for policy in ("fifo", *(p for p in args.policies if p != "fifo")):
            more = ("--resident-experts", resident) if resident < 1 else ()
            common = ("--hosts", hosts, "--max-running", args.max_running, "--step-tokens", args.step_tokens)
            with deployed(
                model.resolve(), *common, "--max-queued", 512, "--max-batching-delay", args.delay,
                "--no-prefix-sharing", "--batching", policy, *more,
            ) as deployment:  # fmt: skip
                for load in (0, *args.loads):
                    row = bench(deployment.target, sent, load * rate if load else _FLOOD)
                    rate = rate or row["requests"]["answered"] / row["seconds"]
                    of = {"model": model.name, "hosts": hosts, "resident": resident, "load": load, "policy": policy}
                    found["rows"].append(row | of | {"offered": load * rate})
                    write(args.out, found)
                    print(line(found["rows"][-1]), flush=True)


def line(row: dict[str, Any]) -> str:
    times = row["end_to_end_ms"]
    server = row["server"]
    hits = server.get("unit_hit_rate")
    return (
        f"| {row['model']} | {row['hosts']} | {row['resident']:.0%} | {row['load']:g} | {row['policy']} |"
        f" {server.get('units_per_step', float('nan')):.1f} | {server['tokens_per_step']:.1f} |"
        f" {row['output_tokens_per_s']:.1f} | {times['p50'] / 1e3:.2f}, {times['p95'] / 1e3:.2f} |"
        f" {'' if hits is None else f'{hits:.2f}'} |"
    )


def write(out: Path, found: dict[str, Any]) -> None:
    rows = [line(row) for row in found["rows"]]
    text = "\n".join(["# Batches by path on real hosts", "", found["what"], "", HEAD, *rows])
    (out / "batching_served.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "batching_served.md").write_text(f"{text}\n\n{sentence(found['around'])}.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="checkpoints that have a path router")
    parser.add_argument("--one-index", type=Path, help="a dense model to cut")
    parser.add_argument("--work", type=Path, default=Path("work"), help="where its cut is kept")
    parser.add_argument("--shared-folder", type=Path, required=True)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--resident", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--loads", type=float, nargs="*", default=[1.0], help="of what fifo bears, besides all at once")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--prompt-tokens", type=int, default=384, help="of a prompt at most")
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument("--step-tokens", type=int, default=64)
    parser.add_argument("--delay", type=float, default=3.0)
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.one_index is not None:
        cut = args.work / f"one-index-{args.one_index.name}"
        args.model.append(random_cut(args.one_index, cut, experts=8, shared=1, active=1, heads="single"))
    if not args.model:
        parser.error("give --model or --one-index")
    what = (
        f"{args.requests} requests of the Azure conversation trace, lengths clipped to {args.prompt_tokens} and 128"
        f" tokens, all at once (load 0) or at so much of what fifo bears then; {args.step_tokens} tokens a step,"
        f" {args.max_running} running at most,"
        f" delay bound {args.delay:g} s. Units of all layers that a step asks for; seconds of an answer."
    )
    found: dict[str, Any] = {"what": what, "around": surroundings("batching_served", ("ray", "grpcio")), "rows": []}
    measure(args, found)


if __name__ == "__main__":
    main()
