"""Quality of every kind of routing on one cut of stories3M, in one run.

    python -m benchmarks.stories --shared-folder ../shared

Dense, static mask of the same active share, random routing, representative gate, linear gate, path router, oracle: on
the same held-out stories by the protocol of `pregate.convert.evaluate`. All routed rows but the representative gate
share one cut of the neurons (that of the linear gate; a gate decides what later layers are profiled on). Also: with
every routed expert on, how far the logits are from the dense model's. Writes results/stories.json and .md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.surroundings import sentence, surroundings
from pregate.convert.agreement import AgreementMeter
from pregate.convert.api import ConvertOptions, DecoupleOptions, RichProgress, convert, decouple
from pregate.convert.controls import AllPolicy, OraclePolicy, RandomPolicy
from pregate.convert.dense import context_tokens, load_tokenizer
from pregate.convert.scoring import encode_all, load_any, score_rows
from pregate.convert.text import read_documents
from pregate.model.layers import RoutingPolicy


@dataclass(frozen=True)
class Held:
    """The held-out documents as ids, and the bytes of text they score."""

    rows: list[list[int]]
    num_bytes: int


def read_held_out(model: Path, path: Path) -> Held:
    context = context_tokens(model)
    texts = [d.text for d in read_documents([path], context, "--held-out")]
    return Held(*encode_all(load_tokenizer(model), texts, context, None))


def measure(model, held: Held, control: RoutingPolicy | None = None, router: str | None = None) -> dict[str, Any]:
    """Perplexity, bits per byte, and how the router called `router` agrees with the oracle."""
    meter = AgreementMeter() if router else None
    score = score_rows(model, held.rows, meter, control=control)
    row: dict[str, Any] = {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte(held.num_bytes)}
    return row | (meter.figures()[f"{router}_vs_oracle"] if meter else {})


@torch.no_grad()
def all_on_difference(dense, routed, held: Held, num_documents: int = 32) -> float:
    """Largest absolute logit difference to the dense model with every routed expert on."""
    routed.routing_policy = AllPolicy()
    rows = (torch.tensor([row]) for row in held.rows[:num_documents])
    worst = max((routed(ids, use_cache=False).logits - dense(ids).logits).abs().max().item() for ids in rows)
    routed.routing_policy = None
    return worst


class Stopwatch:
    """Seconds of each named call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.monotonic()
        result = function(*arguments)
        self.seconds[name] = round(time.monotonic() - started, 1)
        return result


def convert_all(args: argparse.Namespace, work: Path, watch: Stopwatch) -> DecoupleOptions:
    """Write the checkpoints linear, static, representative and path below `work`."""
    progress, source = RichProgress(), args.shared_folder / "models" / "stories3M"
    train = (args.shared_folder / "text" / "stories" / "ts_train.jsonl",)
    linear = ConvertOptions(source, work / "linear", args.experts, args.shared, args.active, train, seed=args.seed)
    static = replace(linear, out=work / "static", shared=args.shared + args.active, active=0)
    representative = replace(linear, out=work / "representative", gate="representative")
    for options in (linear, static, representative):
        watch(f"convert {options.out.name}", convert, options, progress)
    decoupling = DecoupleOptions(work / "linear", work / "path", train, seed=args.seed)
    if args.steps:
        decoupling = replace(decoupling, steps=args.steps)
    watch("decouple", decouple, decoupling, progress)
    return decoupling


def score_all(dense, linear, work: Path, held: Held, seed: int, watch: Stopwatch) -> dict[str, dict[str, Any]]:
    rows = {
        "dense": watch("score dense", measure, dense, held),
        "static mask": measure(load_any(work / "static"), held),
        "random routing": measure(linear, held, RandomPolicy(seed), "control"),
        "representative gate": measure(load_any(work / "representative"), held, None, "gate"),
        "linear gate": measure(linear, held, None, "gate"),
        "path router": measure(load_any(work / "path"), held, None, "path"),
        "oracle": measure(linear, held, OraclePolicy(), "control"),
    }
    for row in rows.values():
        row["ratio_to_dense"] = row["perplexity"] / rows["dense"]["perplexity"]
    return rows


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    source, watch = args.shared_folder / "models" / "stories3M", Stopwatch()
    held = read_held_out(source, args.shared_folder / "text" / "stories" / "ts_heldout.jsonl")
    decoupling = convert_all(args, work, watch)
    dense, linear = load_any(source), load_any(work / "linear")
    rows = score_all(dense, linear, work, held, args.seed, watch)
    return {
        "cut": f"S{args.shared}A{args.active}E{args.experts}",
        "num_documents": len(held.rows),
        "num_tokens": sum(len(row) - 1 for row in held.rows),
        "rows": rows,
        "all_on_max_logit_difference": all_on_difference(dense, linear, held),
        "seconds": watch.seconds,
        "decouple": {"steps": decoupling.steps, "dim": decoupling.dim, "blocks": decoupling.blocks},
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"# stories3M {result['cut']}: routing compared",
        "",
        "| routing | perplexity | ratio to dense | bits per byte | same set as oracle | picks shared with oracle |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for name, row in result["rows"].items():
        figures = [f"{row['perplexity']:.3f}", f"{row['ratio_to_dense']:.3f}", f"{row['bits_per_byte']:.4f}"]
        agreement = [f"{row[k]:.3f}" if k in row else "" for k in ("same_set", "mean_overlap")]
        lines.append(f"| {name} | {' | '.join(figures + agreement)} |")
    seconds = ", ".join(f"{k} {v}" for k, v in result["seconds"].items())
    notes = f"""
{result["num_documents"]} held-out stories, {result["num_tokens"]} scored tokens; per document, BOS prepended, truncated
to the context. No weight was tuned. With every routed expert on, the logits differ from the dense model's by at most
{result["all_on_max_logit_difference"]:.1e}.

{sentence(result["surroundings"])}. Seconds: {seconds}.
"""
    return "\n".join(lines) + "\n" + notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shared-folder", type=Path, required=True, help="folder with models/stories3M and text/stories"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shared", type=int, default=3)
    parser.add_argument("--active", type=int, default=3)
    parser.add_argument("--steps", type=int, help="training steps of the path router; default as `pregate decouple`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        result = run(args, Path(work))
    result["surroundings"] = surroundings("stories", ["transformers"])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "stories.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "stories.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
