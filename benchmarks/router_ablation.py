"""What a path router's options are worth: shape, size, window, embedding, target and gate, one changed at a time.

    python -m benchmarks.router_ablation --shared-folder ../shared

Cuts stories3M by the default recipe, S3A3E8 and S2A2E8, and S3A3E8 once more with a fixed number of experts per token,
for which the paper's losses, softmax gates and DSelect-k were made. Collects what routers learn from once for each;
trains every variant for the same number of steps, the ones it turns on with several seeds, and scores it on held-out
stories: perplexity, and the share of picks in common with an oracle's on the same hidden states. For one index the
experts are renumbered first, as `pregate decouple` does. Writes results/router_ablation.json and .md of the rows there
are; a finished row is kept in --work, so the same command goes on, and processes for different --cuts may fill one
folder. One thread; training and scoring only, no weight of the model is tuned.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.conversion import Bench, rows_in, subject
from benchmarks.cuts import Cut
from benchmarks.surroundings import sentence, surroundings
from pregate.base.choices import Selection
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.measure.controls import OraclePolicy
from pregate.convert.paths.alignment import align_experts
from pregate.convert.paths.decouple import DecoupleOptions, read_rows, routed_with, train_router
from pregate.convert.paths.size import SMALL
from pregate.convert.paths.targets import TargetPool, collect_targets
from pregate.convert.progress import QUIET
from pregate.model import RoutedForCausalLM
from pregate.model.folder import read_folder
from pregate.model.quiet import quiet_transformers
from pregate.model.router_flops import router_flops

#: Cut and selection, by the name of its table.
CUTS: dict[str, tuple[Cut, Selection]] = {
    "S3A3E8": ((8, 3, 3), "threshold"),
    "S2A2E8": ((8, 2, 2), "threshold"),
    "S3A3E8-fixed": ((8, 3, 3), "top_k"),
}
REFERENCES = ("linear gate per layer", "oracle")


@dataclass(frozen=True, eq=False)
class Variant:
    """One row of the table: what of `DecoupleOptions` is not the default, and how many seeds it gets."""

    group: str
    name: str
    change: dict[str, Any] = field(default_factory=dict)
    num_seeds: int = 1

    @property
    def label(self) -> str:
        return f"{self.group}: {self.name}"


DEFAULT = Variant("default", "independent heads, dim 128, 1 block, window 64", num_seeds=3)
PAPER = Variant("target", "the paper's losses", {"target": "paper"})
GATES = (
    Variant("gate", "captured mass, sigmoid or softmax, straight-through", {"target": "captured"}, 3),
    Variant("gate", "captured mass, DSelect-k", {"gate": "dselect"}, 3),
)
VARIANTS = (
    DEFAULT,
    Variant("shape", "recurrent over the layers", {"heads": "recurrent"}),
    Variant("shape", "one index for all layers", {"heads": "single"}),
    Variant("size", "dim 32", {"dim": 32}),
    Variant("size", "dim 256", {"dim": 256}),
    Variant("size", "2 blocks", {"blocks": 2}),
    Variant("window", "1 token", {"window": 1}),
    Variant("window", "8 tokens", {"window": 8}),
    Variant("window", "256 tokens", {"window": 256}),
    Variant("embedding", "the parent's, projected", {"embedding": "parent"}),
    PAPER,
    *GATES,
)
#: What is compared with a fixed number of experts.
FIXED = (DEFAULT, PAPER, *GATES)


class Ablation:
    """One cut of stories3M, what its routers learn from, and its rows; all below the bench's folder."""

    def __init__(self, bench: Bench, name: str, steps: int) -> None:
        (self.cut, selection), self.bench, self.name = CUTS[name], bench, name
        self.variants = VARIANTS if selection == "threshold" else FIXED
        folder = bench.work / name
        source, text = bench.subject.model, bench.subject.calibration
        self.options = DecoupleOptions(folder / "layerwise", folder / "unused", text, **{**SMALL, "steps": steps})
        folder.mkdir(parents=True, exist_ok=True)
        if not self.options.model.exists():
            experts, shared, active = self.cut
            convert(ConvertOptions(source, self.options.model, experts, shared, active, text, selection=selection))

    @cached_property
    def model(self) -> RoutedForCausalLM:
        return RoutedForCausalLM.from_pretrained(self.options.model, dtype=torch.float32).eval()

    @cached_property
    def pool(self) -> TargetPool:
        return collect_targets(self.model, read_rows(self.options, read_folder(self.options.model)), QUIET)

    @cached_property
    def aligned(self) -> tuple[RoutedForCausalLM, TargetPool]:
        """The model with its experts renumbered so that equal numbers go together, and the pool of it."""
        model = deepcopy(self.model)
        return model, align_experts(model, self.pool)

    def references(self) -> None:
        gate, oracle = REFERENCES
        self._row(gate, 0, lambda: self.bench.score(self.model))
        self._row(oracle, 0, lambda: self.bench.score(self.model, OraclePolicy()))

    def variant(self, variant: Variant, seed: int) -> None:
        self._row(variant.label, seed, lambda: self._trained(variant.change, seed))

    def _row(self, row: str, seed: int, make: Callable[[], dict[str, Any]]) -> None:
        self.bench.row(f"{self.name} {row}", self.cut, seed, lambda: {"table": self.name, "of": row} | make())

    def _trained(self, change: dict[str, Any], seed: int) -> dict[str, Any]:
        """Train and score one router."""
        options = replace(self.options, seed=seed, **change)
        model, pool = self.aligned if options.heads == "single" else (self.model, self.pool)
        started = time.monotonic()
        router, _ = train_router(model, pool, options, QUIET)
        seconds = time.monotonic() - started
        flops = router_flops(options.shape(), model.config.cuts, model.config.selection)
        scored = self.bench.score(routed_with(model, router, options))
        return scored | {"flops_per_token": flops, "train_s": round(seconds, 1)}


def fill(bench: Bench, names: Sequence[str], steps: int) -> None:
    """Every row of the cuts `names` that is not there: first all variants with one seed, then more seeds."""
    ablations = [Ablation(bench, name, steps) for name in names]
    for ablation in ablations:
        ablation.references()
    for seed in range(DEFAULT.num_seeds):
        for ablation in ablations:
            for variant in ablation.variants:
                if seed < variant.num_seeds:
                    ablation.variant(variant, seed)


def folder_of(work: Path, steps: int) -> Path:
    """Where rows of routers trained so long are kept: of no other length."""
    return work / f"steps-{steps}"


def write_report(rows: list[dict[str, Any]], facts: dict[str, Any], around: dict[str, Any], out: Path) -> None:
    """Write router_ablation.json and .md to `out`, of the rows there are."""
    out.mkdir(parents=True, exist_ok=True)
    result = {"rows": rows, "facts": facts, "surroundings": around}
    (out / "router_ablation.json").write_text(json.dumps(result, indent=1) + "\n")
    parts = [
        "# Path routers compared",
        "",
        "stories3M cut by the default recipe: experts chosen by a threshold, or (fixed) as many for every token. Every",
        f"router trained for {facts['steps']} steps on {facts['pool_tokens']:,} tokens of other stories, by the",
        "defaults of `pregate decouple` but for what its row names. Perplexity of",
        f"{facts['num_documents']} held-out stories ({facts['num_tokens']} scored tokens); picks: the share in common",
        "with an oracle's on the same hidden states. Means over seeds where there are several, with the range of",
        "perplexity. One index: on experts renumbered so that equal numbers go together. Straight-through gates are a",
        "sigmoid about the threshold, or with a fixed number a softmax.",
    ]
    for name in CUTS:
        if found := [row for row in rows if row["table"] == name]:
            parts += _table(found, name)
    (out / "router_ablation.md").write_text("\n".join([*parts, "", f"{sentence(around)}.", ""]))


def _table(rows: list[dict[str, Any]], name: str) -> list[str]:
    lines = ["", f"## {name}", "", "| | router | perplexity | seeds | picks | FLOPs per token | training, s |"]
    lines.append("| --- | --- | --: | --: | --: | --: | --: |")
    for reference in REFERENCES:
        found = [row for row in rows if row["of"] == reference]
        lines += [f"| reference | {reference} | {r['perplexity']:.3f} | | {r['mean_overlap']:.3f} | | |" for r in found]
    by_variant = [(v, [row for row in rows if row["of"] == v.label]) for v in VARIANTS]
    return lines + [_line(variant, found) for variant, found in by_variant if found]


def _line(variant: Variant, runs: list[dict[str, Any]]) -> str:
    mean = {k: statistics.fmean(r[k] for r in runs) for k in ("perplexity", "mean_overlap", "train_s")}
    perplexities = [r["perplexity"] for r in runs]
    spread = f" ({min(perplexities):.3f} to {max(perplexities):.3f})" if len(runs) > 1 else ""
    cells = [variant.group, variant.name, f"{mean['perplexity']:.3f}", f"{len(runs)}{spread}"]
    cells += [f"{mean['mean_overlap']:.3f}", f"{runs[0]['flops_per_token']:,.0f}", f"{mean['train_s']:.0f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-folder", type=Path, required=True, help="with models/stories3M and text/stories")
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), choices=list(CUTS))
    parser.add_argument("--steps", type=int, default=SMALL["steps"], help="training steps of every router")
    parser.add_argument("--work", type=Path, default=Path("runs/router_ablation"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_transformers()
    work = folder_of(args.work, args.steps)
    bench = Bench(subject("stories3M", args.shared_folder, work), work)
    fill(bench, args.cuts, args.steps)
    rows = rows_in(work, {bench.subject.name}, range(DEFAULT.num_seeds))
    facts = bench.subject.facts | {"steps": args.steps, "pool_tokens": SMALL["pool_tokens"]}
    write_report(rows, facts, surroundings("router_ablation", ["transformers"]), args.out)
    print((args.out / "router_ablation.md").read_text())


if __name__ == "__main__":
    main()
