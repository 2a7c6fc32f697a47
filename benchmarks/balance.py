"""What balancing gains and costs: quartet's path model tuned alike without it, by bias and by loss.

    python -m benchmarks.balance --shared-folder ../shared

Takes S3A3E8 of quartet as `benchmarks.decoupling` makes it (its --work may be given, and what is there is used) and
tunes it for as many tokens with each --balance. Imbalance of a layer: tokens of its busiest expert over the mean, on
validation text. Writes results/balance.json and .md; a finished row is kept in --work.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.conversion import Bench, rows_in
from benchmarks.cuts import Cut, label
from benchmarks.decoupling import Decoupling, tune_figures
from benchmarks.surroundings import sentence, surroundings
from pregate.convert.files.streamed import load_any
from pregate.model.folder import read_folder
from pregate.model.quiet import quiet_transformers

CUT: Cut = (8, 3, 3)
#: Row -> what of the options is not the default.
ROWS: dict[str, dict[str, Any]] = {
    "none": {},
    "bias, --balance-rate 0.001": {"balance": "bias", "balance_rate": 0.001},
    "bias": {"balance": "bias"},
    "loss": {"balance": "loss"},
    "loss, --balance-loss 1": {"balance": "loss", "balance_loss": 1.0},
}


def tuned(one: Decoupling, name: str) -> dict[str, Any]:
    """The row `name` of `ROWS`; its checkpoint is made when it is not there."""
    slug = "-".join([*map(str, ROWS[name].values()), str(one.args.tokens), str(one.args.seed)])
    out = one.tune(one.checkpoint(CUT, "path"), one.folder / "balanced" / slug, ROWS[name])
    figures = tune_figures(out)
    kept = ("tokens", "cpu_seconds", "load_imbalance_before", "load_imbalance_after")
    return one.bench.score(load_any(read_folder(out))) | {name: figures[name] for name in kept}


def markdown(rows: list[dict[str, Any]], around: dict[str, Any]) -> str:
    before = rows[0]["load_imbalance_before"]
    lines = [
        "# Balanced and not",
        "",
        f"quartet, {label(CUT)}, path router, tuned on {rows[0]['tokens']:,} tokens by the defaults of `pregate tune`",
        "but for --balance; held-out perplexity, and tokens of a layer's busiest expert over the mean of its experts",
        "(on validation text). One seed.",
        "",
        "| --balance | perplexity | FFN active | imbalance: mean over layers | worst layer |",
        "| --- | --: | --: | --: | --: |",
        f"| (before) | | | {fmean(before):.3f} | {max(before):.3f} |",
    ]
    for row in rows:
        after = row["load_imbalance_after"]
        cells = [row["row"], f"{row['perplexity']:.3f}", f"{row['active_share']:.3f}"]
        lines.append("| " + " | ".join([*cells, f"{fmean(after):.3f}", f"{max(after):.3f}"]) + " |")
    return "\n".join([*lines, "", f"{sentence(around)}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-folder", type=Path, required=True, help="folder with text")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/decoupling"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_transformers()
    one = Decoupling("quartet", args)
    kept = Bench(one.subject, args.work / f"balance-{args.tokens}")
    for name in ROWS:
        kept.row(name, CUT, args.seed, lambda name=name: tuned(one, name))
    found = {row["row"]: row for row in rows_in(kept.work, {"quartet"}, {args.seed})}
    rows, around = [found[name] for name in ROWS], surroundings("balance", ("transformers",))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "balance.json").write_text(json.dumps({"rows": rows, "surroundings": around}, indent=1) + "\n")
    (args.out / "balance.md").write_text(markdown(rows, around))
    print((args.out / "balance.md").read_text())


if __name__ == "__main__":
    main()
