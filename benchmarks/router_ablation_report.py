"""Tables of `benchmarks.router_ablation`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.router_variants import REFERENCES, Variant, variants_of
from benchmarks.surroundings import sentence

Rows = list[dict[str, Any]]


def write_report(rows: Rows, facts: dict[str, Any], around: dict[str, Any], out: Path) -> None:
    """Write `out`.json and .md, of the rows there are."""
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"rows": rows, "facts": facts, "surroundings": around}
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    texts = [f"{text} ({f['num_documents']} documents, {f['num_tokens']} tokens)" for text, f in facts["texts"].items()]
    parts = [
        f"# Path routers of {facts['model']} compared",
        "",
        f"{facts['model']} cut by the default recipe: experts chosen by a threshold, or (fixed) as many for each.",
        f"Every router trained for {facts['steps']} steps on at most {facts['pool_tokens']:,} tokens of other text, by",
        "the defaults of `pregate decouple` but for what its row names. Scored: " + ", ".join(texts) + ".",
        "Perplexity with thresholds that follow a text / with fixed ones, in brackets the share of the FFN that ran;",
        "picks: the share in common with an oracle's on the same hidden states. Means over seeds, where there are",
        "several with the range of perplexity. One index: on experts renumbered so that equal numbers go together.",
        "Straight-through gates are a sigmoid about the threshold, or with a fixed number a softmax.",
    ]
    for name in dict.fromkeys(row["table"] for row in rows):
        parts += _table([row for row in rows if row["table"] == name], name, facts)
    out.with_suffix(".md").write_text("\n".join([*parts, "", f"{sentence(around)}.", ""]))


def _table(rows: Rows, name: str, facts: dict[str, Any]) -> list[str]:
    texts = list(facts["texts"])
    columns = [f"{text} | picks" for text in texts]
    lines = ["", f"## {name}", "", "| | router | seeds | " + " | ".join(columns) + " | FLOPs per token | training, s |"]
    lines.append("| --- | --- | --: |" + " --: |" * (2 * len(texts) + 2))
    selection = "top_k" if name.endswith("fixed") else "threshold"
    wanted = [Variant("reference", name) for name in REFERENCES]
    for variant in (*wanted, *variants_of(facts["model"], selection)):
        label = variant.name if variant in wanted else variant.label
        if found := [row for row in rows if row["of"] == label]:
            lines.append(_line(variant, found, texts))
    return lines


def _line(variant: Variant, runs: Rows, texts: list[str]) -> str:
    cells = [variant.group, variant.name, str(len(runs))]
    for text in texts:
        kinds = ["scores"] + ["fixed"] * ("fixed" in runs[0])
        cells.append(" / ".join(_scored([run[kind][text] for run in runs]) for kind in kinds))
        cells.append(f"{statistics.fmean(run['scores'][text]['mean_overlap'] for run in runs):.3f}")
    if "fixed" in runs[0]:
        seconds = statistics.fmean(run["train_s"] for run in runs)
        cells += [f"{runs[0]['flops_per_token']:,.0f}", f"{seconds:.0f}"]
    else:
        cells += ["", ""]
    return "| " + " | ".join(cells) + " |"


def _scored(found: Rows) -> str:
    """Perplexity, its range over seeds, and the share that ran."""
    perplexities = [each["perplexity"] for each in found]
    spread = f" [{min(perplexities):.3f} to {max(perplexities):.3f}]" if len(found) > 1 else ""
    share = statistics.fmean(each["active_share"] for each in found)
    return f"{statistics.fmean(perplexities):.3f}{spread} ({share:.3f})"
