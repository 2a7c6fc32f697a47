"""What a path router's options are worth: shape, size, window, embedding, target and gate, one changed at a time.

    python -m benchmarks.router_ablation --shared-folder ../shared

Cuts stories3M twice by the default recipe, S3A3E8 and S2A2E8; collects what routers learn from once for each; trains
every variant for the same number of steps, the ones it turns on with several seeds, and scores it on held-out stories:
perplexity, and the share of picks in common with an oracle's on the same hidden states. Writes
results/router_ablation.json and .md. One thread; training and scoring only, no weight of the model is tuned.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.surroundings import sentence, surroundings
from pregate.convert.agreement import AgreementMeter
from pregate.convert.api import ConvertOptions, DecoupleOptions, QuietProgress, convert
from pregate.convert.controls import OraclePolicy
from pregate.convert.decouple import read_rows, routed_with, train_router
from pregate.convert.dense import context_tokens, load_tokenizer
from pregate.convert.scoring import encode_all, score_rows
from pregate.convert.targets import collect_targets
from pregate.convert.text import read_documents
from pregate.model import RoutedForCausalLM
from pregate.model.layers import RoutingPolicy
from pregate.model.quiet import quiet_transformers
from pregate.model.router_flops import router_flops

CUTS = {"S3A3E8": (3, 3), "S2A2E8": (2, 2)}


@dataclass(frozen=True, eq=False)
class Variant:
    """One row of the table: what of `DecoupleOptions` is not the default, and how many seeds it gets."""

    group: str
    name: str
    change: dict[str, Any] = field(default_factory=dict)
    num_seeds: int = 1


VARIANTS = (
    Variant("default", "independent heads, dim 128, 1 block, window 64", num_seeds=3),
    Variant("shape", "recurrent over the layers", {"heads": "recurrent"}),
    Variant("shape", "one index for all layers", {"heads": "single"}),
    Variant("size", "dim 32", {"dim": 32}),
    Variant("size", "dim 256", {"dim": 256}),
    Variant("size", "2 blocks", {"blocks": 2}),
    Variant("window", "1 token", {"window": 1}),
    Variant("window", "8 tokens", {"window": 8}),
    Variant("window", "256 tokens", {"window": 256}),
    Variant("embedding", "the parent's, projected", {"embedding": "parent"}),
    Variant("target", "the paper's losses", {"target": "paper"}),
    Variant("gate", "captured mass, softmax or sigmoid, straight-through", {"target": "captured"}, 3),
    Variant("gate", "captured mass, DSelect-k", {"gate": "dselect"}, 3),
)


def held_out_rows(path: Path, text: Path, every: int) -> list[list[int]]:
    """One in `every` of the held-out documents, as token ids."""
    context = context_tokens(path)
    documents = read_documents([text], context, "--shared-folder")
    return encode_all(load_tokenizer(path), [d.text for d in documents], context, None)[0][::every]


def scored(
    model: RoutedForCausalLM, rows: Sequence[list[int]], name: str, policy: RoutingPolicy | None = None
) -> dict[str, float]:
    """Perplexity, share of the FFN that ran, and picks in common with the oracle of whoever `name` says routes."""
    meter = AgreementMeter()
    score = score_rows(model, rows, meter, control=policy)
    return {
        "perplexity": score.perplexity,
        "active_share": meter.active_share,
        "oracle_picks": meter.figures()[f"{name}_vs_oracle"]["mean_overlap"],
    }


class Cut:
    """One cut model with what its routers learn from and are scored on."""

    def __init__(self, name: str, args: argparse.Namespace, work: Path) -> None:
        stories = args.shared_folder / "text" / "stories"
        (shared, active), train = CUTS[name], (stories / "ts_train.jsonl",)
        out = work / name
        convert(ConvertOptions(args.shared_folder / "models" / "stories3M", out, 8, shared, active, train))
        self.options = DecoupleOptions(out, work / "unused", train, steps=args.steps)
        self.model = RoutedForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        self.pool = collect_targets(self.model, read_rows(self.options), QuietProgress())
        self.rows = held_out_rows(out, stories / "ts_heldout.jsonl", args.every)

    def run(self, change: dict[str, Any], seed: int) -> dict[str, Any]:
        """Train and score one router."""
        options, started = replace(self.options, seed=seed, **change), time.monotonic()
        router, _ = train_router(self.model, self.pool, options, QuietProgress())
        seconds = time.monotonic() - started
        flops = router_flops(options.shape(), self.model.config.cuts, self.model.config.selection)
        routed = routed_with(self.model, router, options)
        return scored(routed, self.rows, "path") | {"flops_per_token": flops, "train_s": round(seconds, 1)}

    def references(self) -> dict[str, dict[str, float]]:
        """The layers' linear gates, and the oracle."""
        return {
            "linear gate per layer": scored(self.model, self.rows, "gate"),
            "oracle": scored(self.model, self.rows, "control", OraclePolicy()),
        }


def mean_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds; `perplexity_range` is the least and greatest."""
    means = {name: statistics.fmean(r[name] for r in runs) for name in runs[0]}
    perplexities = [r["perplexity"] for r in runs]
    return means | {"num_seeds": len(runs), "perplexity_range": [min(perplexities), max(perplexities)]}


def run(args: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """Give the result so far after every router: first all variants with one seed, then more seeds."""
    cuts = {name: Cut(name, args, work) for name in CUTS}
    references = {name: cut.references() for name, cut in cuts.items()}
    runs: dict[tuple[str, Variant], list[dict[str, Any]]] = {}
    first = cuts["S3A3E8"]
    result = {
        "steps": args.steps,
        "num_documents": len(first.rows),
        "num_tokens": sum(len(row) - 1 for row in first.rows),
        "pool_tokens": sum(map(len, first.pool.rows)),
    }
    for seed in range(max(v.num_seeds for v in VARIANTS)):
        for name, cut in cuts.items():
            for variant in VARIANTS:
                if seed < variant.num_seeds:
                    runs.setdefault((name, variant), []).append(cut.run(variant.change, seed))
                    yield result | {"cuts": {n: _table(n, references[n], runs) for n in cuts}}


def _table(cut: str, references: dict[str, Any], runs: dict[tuple[str, Variant], list[dict[str, Any]]]) -> dict:
    rows = [
        {"group": v.group, "name": v.name, "change": v.change} | mean_of(runs[cut, v])
        for v in VARIANTS
        if (cut, v) in runs
    ]
    return {"references": references, "rows": rows}


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# Path routers compared",
        "",
        "stories3M cut twice by the default recipe (selection by threshold). Every router trained for",
        f"{result['steps']} steps on {result['pool_tokens']} tokens of other stories, by the defaults of",
        "`pregate decouple` but for what its row names. Perplexity of",
        f"{result['num_documents']} held-out stories ({result['num_tokens']} scored tokens); picks: the share in",
        "common with an oracle's on the same hidden states. Means over seeds where there are several, with the",
        "range of perplexity.",
    ]
    for name, table in result["cuts"].items():
        lines += ["", f"## {name}", "", "| | router | perplexity | seeds | picks | FLOPs per token | training, s |"]
        lines.append("| --- | --- | --: | --: | --: | --: | --: |")
        for reference, row in table["references"].items():
            lines.append(f"| reference | {reference} | {row['perplexity']:.3f} | | {row['oracle_picks']:.3f} | | |")
        lines += [_line(row) for row in table["rows"]]
    return "\n".join(lines) + f"\n\n{sentence(result['surroundings'])}.\n"


def _line(row: dict[str, Any]) -> str:
    least, most = row["perplexity_range"]
    seeds = f"{row['num_seeds']} ({least:.3f} to {most:.3f})" if row["num_seeds"] > 1 else "1"
    cells = [row["group"], row["name"], f"{row['perplexity']:.3f}", seeds, f"{row['oracle_picks']:.3f}"]
    return "| " + " | ".join([*cells, f"{row['flops_per_token']:,.0f}", f"{row['train_s']:.0f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-folder", type=Path, required=True, help="with models/stories3M and text/stories")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--steps", type=int, default=300, help="training steps of every router")
    parser.add_argument("--every", type=int, default=1, help="score one held-out story in so many")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_transformers()
    args.out.mkdir(parents=True, exist_ok=True)
    around = surroundings("router_ablation", ["transformers"])
    with tempfile.TemporaryDirectory() as work:
        for result in run(args, Path(work)):
            result["surroundings"] = around
            (args.out / "router_ablation.json").write_text(json.dumps(result, indent=1) + "\n")
            (args.out / "router_ablation.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
