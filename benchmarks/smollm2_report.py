"""Tables and picture of `benchmarks.smollm2`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.conversion_report import pyplot
from benchmarks.cuts import in_order
from benchmarks.surroundings import sentence

Rows = list[dict[str, Any]]
CONTROLS = ("static mask", "random routing", "paper's gate", "linear gate", "path router", "oracle")


def write_report(rows: Rows, around: dict[str, Any], out: Path) -> None:
    """Write smollm2.json, .md and .png to `out`, of the rows there are."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "smollm2.json").write_text(json.dumps({"rows": rows, "surroundings": around}, indent=1) + "\n")
    parts = ["# A real language model: SmolLM2-135M", ""]
    parts += ["Perplexity, in brackets over the dense parent and the share of the FFN that ran.", ""]
    for text, tokens in dict.fromkeys((r["text"], r["tokens"]) for r in rows if r["kind"] == "path"):
        of_text = [r for r in rows if (r["text"], r["tokens"]) == (text, tokens)]
        parts += [f"## {text}, {tokens} tokens", "", *_table(of_text), ""]
    parts += [*_shares([r for r in rows if r["kind"].startswith("share-")]), "", f"{sentence(around)}.", ""]
    (out / "smollm2.md").write_text("\n".join(parts))
    _picture([r for r in rows if r["kind"] == "path"], out / "smollm2.png")


def _pick(rows: Rows, **fields: Any) -> Rows:
    return [r for r in rows if all(r[k] == v for k, v in fields.items())]


def _table(rows: Rows) -> list[str]:
    names = (*CONTROLS, "CMoE's recipe", "tuned")
    parts = ["| cut | seeds | dense | " + " | ".join(names) + " |", "| --- |" + " --: |" * (len(names) + 2)]
    for cut in sorted({r["cut"] for r in rows}, key=in_order):
        path = _pick(rows, cut=cut, kind="path")
        if not path:
            continue
        dense = path[0]["controls"]["dense parent"]["perplexity"]
        cells = [_cell([r["controls"][name] for r in path if name in r["controls"]], dense) for name in CONTROLS]
        cells += [_cell(_pick(rows, cut=cut, kind=kind), dense) for kind in ("cmoe-paper", "tuned")]
        parts.append(f"| {cut} | {len(path)} | {dense:.2f} | " + " | ".join(cells) + " |")
    return parts


def _cell(found: Rows, dense: float) -> str:
    if not found:
        return ""
    perplexity, share = (mean(r[name] for r in found) for name in ("perplexity", "active_share"))
    spread = sorted(r["perplexity"] for r in found)
    several = f", {spread[0]:.2f} to {spread[-1]:.2f}" if len(found) > 1 else ""
    return f"{perplexity:.2f} ({perplexity / dense:.3f}; {share:.3f}{several})"


def _shares(rows: Rows) -> list[str]:
    """What ran on each folder of text, thresholds fixed and following it."""
    if not rows:
        return []
    folders = list(dict.fromkeys(r["text"] for r in rows))
    parts = ["## Share of the FFN that ran, by folder of text", ""]
    parts += ["In brackets the perplexity at that share.", ""]
    parts += ["| cut | thresholds | " + " | ".join(folders) + " |", "| --- | --- |" + " --: |" * len(folders)]
    for cut in dict.fromkeys(r["cut"] for r in rows):
        for kind in ("fixed", "held"):
            found = [_pick(rows, cut=cut, kind=f"share-{kind}", text=folder) for folder in folders]
            cells = [f"{r[0]['active_share']:.3f} ({r[0]['perplexity']:.2f})" if r else "" for r in found]
            parts.append(f"| {cut} | {kind} | " + " | ".join(cells) + " |")
    return parts


def _picture(rows: Rows, path: Path) -> None:
    """Ratio to dense of every control, a group of bars for each cut and text."""
    plt = pyplot()
    if plt is None or not rows:
        return
    groups = list(dict.fromkeys((r["cut"], r["text"], r["tokens"]) for r in rows))
    shown = [name for name in CONTROLS if name != "random routing"]
    figure, axes = plt.subplots(figsize=(1.5 + 2 * len(groups), 4))
    for at, name in enumerate(shown):
        found = [
            [
                r["controls"][name]["ratio_to_dense"]
                for r in _pick(rows, cut=c, text=t, tokens=n)
                if name in r["controls"]
            ]
            for c, t, n in groups
        ]
        places = [g + (at - len(shown) / 2) * 0.16 for g in range(len(groups))]
        axes.bar(places, [mean(f) if f else 0 for f in found], 0.15, label=name)
    axes.set_xticks(range(len(groups)), [f"{cut}\n{text}" for cut, text, _ in groups])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(0.9, None)
    axes.set_ylabel("perplexity over dense")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
