"""Table, judgement and picture of `benchmarks.conversion`."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.cuts import in_order
from benchmarks.surroundings import sentence

METHODS = ("static", "random", "cmoe-paper", "plain", "ours", "oracle of plain", "oracle of ours")


def write_report(
    rows: list[dict[str, Any]], facts: dict[str, Any], recipes: dict[str, Any], around: dict[str, Any], out: Path
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    result = {"rows": rows, "facts": facts, "recipes": recipes, "surroundings": around}
    (out / "conversion.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "conversion.md").write_text(_markdown(rows, facts, around))
    _picture(rows, out / "conversion.png")


def _pick(rows: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    return sorted((r for r in rows if all(r[k] == v for k, v in fields.items())), key=lambda r: r["seed"])


def _markdown(rows: list[dict[str, Any]], facts: dict[str, Any], around: dict[str, Any]) -> str:
    parts = ["# Training-free conversion: every recipe, three calibration seeds", ""]
    for model, about in facts.items():
        parts += _model_part(rows, model, about)
    minutes = sum(r["seconds"] for r in rows) / 60
    parts += [
        "Perplexity per document, BOS prepended, truncated to the context; no weight was tuned. Mean of three seeds,"
        " smallest and largest. `static` and `random` run on ours' cut. An oracle chooses by true"
        " contribution, as its recipe does: a fixed number of experts (plain), or all above a threshold (ours).",
        "",
        f"{sentence(around)}. {minutes:.0f} minutes of computing in all.",
        "",
    ]
    return "\n".join(parts)


def _model_part(rows: list[dict[str, Any]], model: str, facts: dict[str, Any]) -> list[str]:
    (dense,) = _pick(rows, model=model, row="dense")
    cuts = sorted({r["cut"] for r in rows if r["model"] == model and r["cut"]}, key=in_order)
    head = f"{facts['num_documents']} held-out documents, {facts['num_tokens']} scored tokens."
    parts = [f"## {model}", "", f"Dense parent: perplexity {dense['perplexity']:.3f}. {head}", ""]
    parts += ["| cut | " + " | ".join(METHODS) + " | share of FFN active in ours |", "| --- |" + " --: |" * 8]
    for cut in cuts:
        cells = [_range([r["perplexity"] for r in _pick(rows, model=model, cut=cut, row=m)]) for m in METHODS]
        shares = [r["active_share"] for r in _pick(rows, model=model, cut=cut, row="ours")]
        parts.append(f"| {cut} | " + " | ".join(cells) + f" | {mean(shares):.3f} |")
    parts += ["", *_judgement(rows, model, cuts, dense["perplexity"]), ""]
    for cut in dict.fromkeys(c for c in cuts if any("shared_per_layer" in r for r in rows if r["cut"] == c)):
        parts += [*_variants(rows, model, cut), ""]
    return parts


def _range(values: list[float]) -> str:
    """Mean of the seeds, with smallest and largest."""
    digits = 2 if max(values) < 1000 else 0
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _judgement(rows: list[dict[str, Any]], model: str, cuts: list[str], dense: float) -> list[str]:
    """Per cut and seed: ours over plain, and ours' gap to its oracle over plain's to its own."""
    parts = [
        "Judged in each seed: ours at least 10 % below plain, its gap to its oracle at most half of plain's.",
        "",
        "| cut | ours / plain | at most 0.9? | (ours - dense) / (plain - dense) | gap to ours' oracle, ours / plain |"
        " at most 0.5? | gap to own oracle, ours / plain | at most 0.5? | picks shared with the oracle: plain, paper,"
        " ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cut in cuts:
        by = {m: _pick(rows, model=model, cut=cut, row=m) for m in METHODS}
        value = {m: [r["perplexity"] for r in by[m]] for m in METHODS}
        seeds = range(len(value["ours"]))
        ratios = [value["ours"][i] / value["plain"][i] for i in seeds]
        excess = ", ".join(f"{(value['ours'][i] - dense) / (value['plain'][i] - dense):.3f}" for i in seeds)
        gaps = [
            (value["ours"][i] - value["oracle of ours"][i]) / (value["plain"][i] - value["oracle of plain"][i])
            for i in seeds
        ]
        same = [
            (value["ours"][i] - value["oracle of ours"][i]) / (value["plain"][i] - value["oracle of ours"][i])
            for i in seeds
        ]
        picks = ", ".join(f"{mean(r['mean_overlap'] for r in by[m]):.3f}" for m in ("plain", "cmoe-paper", "ours"))
        shown = [", ".join(f"{r:.3f}" for r in ratios), _verdict(ratios, 0.9), excess]
        for ratio in (same, gaps):
            shown += [", ".join(f"{g:.2f}" for g in ratio), _verdict(ratio, 0.5)]
        shown.append(picks)
        parts.append(f"| {cut} | " + " | ".join(shown) + " |")
    return parts


def _verdict(values: list[float], bar: float) -> str:
    return "yes" if all(0 <= v <= bar for v in values) else f"in {sum(0 <= v <= bar for v in values)} of {len(values)}"


def _variants(rows: list[dict[str, Any]], model: str, cut: str) -> list[str]:
    here = [r for r in rows if r["model"] == model and r["cut"] == cut]
    names = list(dict.fromkeys(r["row"] for r in here if "shared_per_layer" in r))
    order = {name: mean(r["perplexity"] for r in _pick(here, row=name)) for name in names}
    for name in ("plain", "ours"):
        order[name] = mean(r["perplexity"] for r in _pick(rows, model=model, row=name, cut=cut))
    parts = [
        f"One thing changed at a time, {cut}:",
        "",
        "| variant | perplexity, seeds | active share |",
        "| --- | --- | --: |",
    ]
    for name in sorted(order, key=lambda n: order[n]):
        seeds = _pick(rows, model=model, row=name, cut=cut)
        figures = ", ".join(f"{r['perplexity']:.3f}" for r in seeds)
        parts.append(f"| {name} | {figures} | {mean(r['active_share'] for r in seeds):.3f} |")
    return parts


def pyplot() -> Any | None:
    """matplotlib's pyplot, drawing to files; None, and a line that says so, where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:  # it is not in the development group
        print("no picture: pip install 'pregate[bench]'")
        return None
    importlib.import_module("matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def _picture(rows: list[dict[str, Any]], path: Path) -> None:
    if (plt := pyplot()) is None:
        return
    models = list(dict.fromkeys(r["model"] for r in rows))
    figure, axes = plt.subplots(len(models), 2, figsize=(11, 4.2 * len(models)), squeeze=False)
    for model, line in zip(models, axes, strict=True):
        (dense,) = _pick(rows, model=model, row="dense")
        for experts, axis in zip((8, 16), line, strict=True):
            _panel(axis, rows, model, experts, dense["perplexity"])
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _panel(axis: Any, rows: list[dict[str, Any]], model: str, experts: int, dense: float) -> None:
    cuts = {r["cut"] for r in rows if r["model"] == model and r["cut"].endswith(f"E{experts}")}
    for method in METHODS:
        points = sorted(
            (100 * mean(r["active_share"] for r in seeds), [r["perplexity"] / dense for r in seeds])
            for cut in cuts
            if (seeds := _pick(rows, model=model, cut=cut, row=method))
        )
        style = {
            "ours": {"linewidth": 2.5},
            "oracle of ours": {"linestyle": ":"},
            "oracle of plain": {"linestyle": ":"},
        }
        drawn = axis.plot(
            [x for x, _ in points], [mean(y) for _, y in points], marker="o", label=method, **style.get(method, {})
        )
        for x, values in points:
            axis.vlines(x, min(values), max(values), color=drawn[0].get_color())
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_title(f"{model}, {experts} experts")
    axis.set_xlabel("share of the FFN active, %")
    axis.set_ylabel("perplexity / dense parent's")
