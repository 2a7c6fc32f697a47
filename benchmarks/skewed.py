"""Real hosts under skewed use: rows of the busiest host over the mean, and tokens a second, by placement.

    python -m benchmarks.skewed --parent SMOLLM2 --work DIR [--hosts 4]

The dense model is cut by chance (`random_cut`), with a router that favours some experts in each layer. Every placement
is served by a `pregate serve` of its own, with the same requests: until use has been measured and experts have moved,
and then once more, which is what counts. What a layer's slowest host has over the mean, step by step, no client can
see: that is simulated with the same planner (`benchmarks.scale`). Writes results/skewed.json and .md.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.deployment import deployed
from benchmarks.random_cut import random_cut
from benchmarks.surroundings import ROOT, sentence, surroundings
from pregate.base.completion import Completion
from pregate.client.client import Client

WAYS = {
    "linear": ("--placement", "linear"),
    "balanced": ("--placement", "balanced"),
    "balanced + 25 % copies, chosen in every step": ("--placement", "balanced", "--replicas", 0.25),
}
EXPERTS, SHARED, ACTIVE, SKEW = 16, 2, 2, 1.0
#: Between looks at use; experts move at such looks alone.
REBALANCE_S = 5.0
_TIMEOUT_S = 600.0


def questions(args: argparse.Namespace) -> list[str]:
    return [json.loads(line)["question"] for line in args.prompts.read_text().splitlines()[: args.requests]]


def load(client: Client, args: argparse.Namespace) -> tuple[np.ndarray, float]:
    """Send the requests, `args.at_once` at a time; returns rows by host [H] and new tokens a second."""

    def ask(text: str) -> Completion:
        return client.complete(text, args.new_tokens, ignore_eos=True)

    start_s = time.monotonic()
    with ThreadPoolExecutor(args.at_once) as threads:
        answers = list(threads.map(ask, questions(args)))
    took_s = time.monotonic() - start_s
    rows_H = np.array([answer.rows_per_host for answer in answers]).sum(axis=0)
    return rows_H, sum(answer.completion_tokens for answer in answers) / took_s


def settled(client: Client, args: argparse.Namespace) -> int:
    """Send load until two rounds find the same experts on every host; returns how many rounds it took."""
    before: list[int] = []
    for rounds in range(1, args.rounds + 1):
        load(client, args)
        time.sleep(2 * REBALANCE_S)
        now = [host.num_units for host in client.loads().hosts]
        if now == before:
            return rounds
        before = now
    return args.rounds


def measured(model: Path, way: str, args: argparse.Namespace) -> dict[str, Any]:
    moving = () if way == "linear" else ("--rebalance-s", REBALANCE_S)
    with (
        deployed(model, "--hosts", args.hosts, *WAYS[way], *moving) as deployment,
        Client(deployment.target, timeout_s=_TIMEOUT_S) as client,
    ):
        rounds = settled(client, args)
        rows_H, tokens_per_s = load(client, args)
        units = [host.num_units for host in client.loads().hosts]
        most = most_asked(client, questions(args))
    return {
        "way": way,
        "most_asked": most,
        "rounds_before": rounds,
        "units": units,
        "rows": rows_H.tolist(),
        "busiest": float(rows_H.max() / rows_H.mean()),
        "tokens_per_s": tokens_per_s,
    }


def table(found: dict[str, Any], args: argparse.Namespace) -> str:
    lines = [
        "# Skewed use on real hosts",
        "",
        f"S{SHARED}A{ACTIVE}E{EXPERTS} of {args.parent.name}, cut by chance; {args.hosts} host processes share the",
        f"machine's cores, {args.requests} GSM8K questions, {args.at_once} at once, {args.new_tokens} new tokens each.",
        f"The most asked expert of a layer gets {found['ways'][0]['most_asked']:.1f} times the mean.",
        "",
        "| placement | rows of the busiest host over the mean | experts held by host | tokens/s |",
        "| --- | --: | --- | --: |",
    ]
    for row in found["ways"]:
        held = ", ".join(map(str, row["units"]))
        lines.append(f"| {row['way']} | {row['busiest']:.3f} | {held} | {row['tokens_per_s']:.1f} |")
    return "\n".join([*lines, "", f"{sentence(found['surroundings'])}.", ""])


def most_asked(client: Client, texts: list[str]) -> float:
    """Of texts' paths: how often a layer's most asked expert is asked for, over the mean of its layer."""
    uses_LR = 0
    for text in texts:
        ids_TLK = np.array(client.route(text).paths)
        uses_LR = uses_LR + np.array(
            [np.bincount(ids.ravel(), minlength=EXPERTS - SHARED) for ids in ids_TLK.swapaxes(0, 1)]
        )
    return float((np.max(uses_LR, axis=1) / np.mean(uses_LR, axis=1)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--work", type=Path, required=True, help="where its cut is kept")
    parser.add_argument("--prompts", type=Path, default=ROOT.parent / "shared" / "text" / "math" / "gsm8k-test.jsonl")
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8, help="most rounds of load until experts have moved")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    model = random_cut(args.parent, args.work / "skewed", experts=EXPERTS, shared=SHARED, active=ACTIVE, skew=SKEW)
    found: dict[str, Any] = {"surroundings": surroundings("skewed", ("transformers", "ray")), "ways": []}
    for way in WAYS:
        found["ways"].append(measured(model, way, args))
        (args.out / "skewed.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.out / "skewed.md").write_text(table(found, args))
        print(found["ways"][-1], flush=True)


if __name__ == "__main__":
    main()
