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
#: What is said of a cut's row, by its kind; training-free ones share theirs.
TUNED = {"router": ", router tuned alone", "tuned": ", tuned"}
CONTROLS = ("static mask", "random routing", "paper's gate", "linear gate", "path router", "oracle")


def write_report(rows: Rows, around: dict[str, Any], out: Path) -> None:
    """Write smollm2.json, .md and .png to `out`, of the rows there are."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "smollm2.json").write_text(json.dumps({"rows": rows, "surroundings": around}, indent=1) + "\n")
    parts = ["# A real language model: SmolLM2-135M", ""]
    parts += ["Perplexity, in brackets over the dense parent and the share of the FFN that ran.", ""]
    tuned = {r["cut"] + TUNED[r["kind"]]: r["tuning"] for r in rows if "tuning" in r}
    parts += [line for name, found in tuned.items() for line in (f"{name}: {_tuning(found)}.", "")]
    for text, tokens in dict.fromkeys((r["text"], r["tokens"]) for r in rows if "controls" in r):
        of_text = [r for r in rows if (r["text"], r["tokens"]) == (text, tokens)]
        parts += [f"## {text}, {tokens} tokens", "", *_table(of_text), ""]
    parts += [*_shares([r for r in rows if r["kind"].startswith("share-")]), ""]
    parts += [f"{_machines(rows)} The tables by {sentence(around)}.", ""]
    (out / "smollm2.md").write_text("\n".join(parts))
    _picture([r for r in rows if "controls" in r], out / "smollm2.png")


def _pick(rows: Rows, **fields: Any) -> Rows:
    return [r for r in rows if all(r[k] == v for k, v in fields.items())]


def _machines(rows: Rows) -> str:
    """Where the rows come from: from one machine to another a per cent says nothing (docs/measurements.md)."""
    dates: dict[str, list[str]] = {}
    for row in rows:
        dates.setdefault(row["made"]["cpu"], []).append(row["made"]["date"][:10])
    found = [f"{len(days)} on {cpu} ({', '.join(sorted(set(days)))})" for cpu, days in dates.items()]
    return f"Rows: {'; '.join(found)}."


def _tuning(found: dict[str, Any]) -> str:
    """How a checkpoint was tuned and what became of its validation text."""
    options, before = found["options"], found["validation_perplexity_before"]
    fitted = found.get("refit", {}).get("validation_perplexity")
    steps = f"{found['steps']} steps of {options['batch_tokens']} tokens"
    parts = [f"{found['num_trained_parameters'] / 1e6:.1f} M parameters", f"{found['tokens']} tokens in {steps}"]
    parts += [f"KL share {options['kl_share']:g}"]
    parts += [f"{found['cpu_seconds'] / 60:.0f} CPU minutes on {found['threads']} thread"]
    after = f"{before:.2f} before" + (f", {fitted:.2f} after the closed-form fit" if fitted else "")
    return (
        ", ".join(parts)
        + f"; perplexity of validation text {after}, {found['validation_perplexity_after']:.2f} after tuning"
    )


def _table(rows: Rows) -> list[str]:
    """A line for each cut, and one for each way it was tuned."""
    names = (*CONTROLS, "CMoE's recipe")
    parts = ["| cut | dense | " + " | ".join(names) + " |", "| --- |" + " --: |" * (len(names) + 1)]
    for cut in sorted({r["cut"] for r in rows}, key=in_order):
        lines = {cut: ("path", "layerwise")} | {cut + said: (kind,) for kind, said in TUNED.items()}
        for name, kinds in lines.items():
            found = [r for r in _pick(rows, cut=cut) if r["kind"] in kinds]
            by_name = {control: _of_control(found, control) for control in ("dense parent", *CONTROLS)}
            if not by_name["dense parent"]:
                continue
            dense = by_name.pop("dense parent")[0]["perplexity"]
            paper = _pick(rows, cut=cut, kind="cmoe-paper") if name == cut else []
            cells = [_cell(f, dense) for f in (*by_name.values(), paper)]
            parts.append(f"| {name} | {dense:.2f} | " + " | ".join(cells) + " |")
    return parts


def _of_control(rows: Rows, name: str) -> Rows:
    """A control's figures, one for each calibration seed; of gates the rows without controls too."""
    by_seed = {r["seed"]: r["controls"][name] for r in rows if name in r.get("controls", {})}
    if name == "linear gate":
        by_seed = {r["seed"]: r for r in rows if r["routing"] == "layerwise"} | by_seed
    return list(by_seed.values())


def _cell(found: Rows, dense: float) -> str:
    if not found:
        return ""
    perplexity, share = (mean(r[name] for r in found) for name in ("perplexity", "active_share"))
    spread = sorted(r["perplexity"] for r in found)
    several = f"; {len(found)} seeds, {spread[0]:.2f} to {spread[-1]:.2f}" if len(found) > 1 else ""
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
    """Ratio to dense of every control, a group of bars for each text, cut and tuning; more than 3 is cut off."""
    plt = pyplot()
    if plt is None or not rows:
        return
    groups: dict[str, Rows] = {}
    for row in sorted(rows, key=lambda r: (r["text"], r["tokens"], in_order(r["cut"]), TUNED.get(r["kind"], ""))):
        name = f"{row['cut']}{TUNED.get(row['kind'], '')}\n{row['text']}, {row['tokens']}"
        groups.setdefault(name, []).append(row)
    shown = [name for name in CONTROLS if name != "random routing"]
    figure, axes = plt.subplots(figsize=(1.5 + 1.6 * len(groups), 4))
    for at, name in enumerate(shown):
        ratios = [
            [c["ratio_to_dense"] for c in _of_control(found, name) if "ratio_to_dense" in c]
            for found in groups.values()
        ]
        places = [g + (at - len(shown) / 2) * 0.16 for g in range(len(groups))]
        axes.bar(places, [mean(found) if found else 0 for found in ratios], 0.15, label=name)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(0.9, 3)
    axes.set_ylabel("perplexity over dense")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
