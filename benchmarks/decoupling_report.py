"""Tables and picture of `benchmarks.decoupling`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.conversion_report import pyplot
from benchmarks.cuts import cut_of, in_order
from benchmarks.surroundings import sentence

FREE = ("layer-wise", "path router", "one index", "random", "oracle")
#: The dense model tuned without the teacher that it is itself: whether the text has anything to teach it.
ALONE = "dense tuned, cross-entropy alone"
TUNED = ("layer-wise tuned", "path router tuned", "Read-ME tuned")
#: Row -> its checkpoint before tuning.
BEFORE = {"layer-wise tuned": "layer-wise", "path router tuned": "path router", "Read-ME tuned": "Read-ME"}
#: Aim: how far a decoupled and tuned model may be behind the equally tuned dense parent, by active share.
AIMS = {0.75: 1.03, 0.5: 1.10}

Rows = list[dict[str, Any]]


def write_report(rows: Rows, facts: dict[str, Any], options: dict[str, Any], around: dict[str, Any], out: Path) -> None:
    """Write decoupling.json, .md and .png to `out`, of the rows there are; every model in `facts` has its dense row."""
    out.mkdir(parents=True, exist_ok=True)
    result = {"rows": rows, "facts": facts, "options": options, "surroundings": around}
    (out / "decoupling.json").write_text(json.dumps(result, indent=1) + "\n")
    parts = ["# Paths fixed before the model runs, against gates in every layer", ""]
    for model, about in facts.items():
        parts += _model_part([r for r in rows if r["model"] == model], model, about)
    parts += [*_notes(rows, options), "", f"{sentence(around)}.", ""]
    (out / "decoupling.md").write_text("\n".join(parts))
    _picture(rows, list(facts), out / "decoupling.png")


def _one(rows: Rows, row: str, cut: str = "") -> dict[str, Any] | None:
    return next((r for r in rows if r["row"] == row and r["cut"] == cut), None)


def _cuts(rows: Rows, names: tuple[str, ...]) -> list[str]:
    return sorted({r["cut"] for r in rows if r["row"] in names}, key=in_order)


def _model_part(rows: Rows, model: str, facts: dict[str, Any]) -> list[str]:
    dense, tuned = _one(rows, "dense"), _one(rows, "dense tuned")
    about = f"{facts['num_documents']} held-out documents, {facts['num_tokens']} scored tokens."
    parts = [f"## {model}", ""]
    if dense is not None:
        parts += [f"Dense parent: perplexity {dense['perplexity']:.3f}. {about}", "", *_free_table(rows), ""]
    if tuned is not None:
        parts += [*_tuned_table(rows, tuned), ""]
    return parts


def _free_table(rows: Rows) -> list[str]:
    """Perplexity, and in brackets the share of picks that are the oracle's."""
    parts = ["Without training the model: perplexity (share of picks in common with the oracle).", ""]
    parts += ["| cut | " + " | ".join(FREE) + " | FFN active: " + ", ".join(FREE[:3]) + " |"]
    parts += ["| --- |" + " --: |" * (len(FREE) + 1)]
    for cut in _cuts(rows, FREE):
        found = {name: _one(rows, name, cut) for name in FREE}
        cells = [_free_cell(found[name]) for name in FREE]
        shares = ", ".join("" if (row := found[name]) is None else f"{row['active_share']:.3f}" for name in FREE[:3])
        parts.append(f"| {cut} | " + " | ".join(cells) + f" | {shares} |")
    return parts


def _free_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    picks = f" ({row['mean_overlap']:.3f})" if "mean_overlap" in row else ""
    return f"{row['perplexity']:.2f}{picks}"


def _tuned_table(rows: Rows, dense: dict[str, Any]) -> list[str]:
    parts = [
        "Tuned alike, early-stopped on validation text:",
        "",
        "| cut | model | perplexity before | **tuned** | over dense tuned | aim | FFN active | tokens | minutes |"
        " CPU hours |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |",
        _tuned_line("", "dense tuned", _one(rows, "dense"), dense, dense),
    ]
    if (alone := _one(rows, ALONE)) is not None:
        parts.append(_tuned_line("", ALONE, _one(rows, "dense"), alone, dense))
    for cut in _cuts(rows, TUNED):
        for name in TUNED:
            if (row := _one(rows, name, cut)) is not None:
                parts.append(_tuned_line(cut, name, _one(rows, BEFORE[name], cut), row, dense))
    return parts


def _tuned_line(cut: str, name: str, before: dict[str, Any] | None, row: dict[str, Any], dense: dict[str, Any]) -> str:
    aim = f"{AIMS[share]:.2f}" if (share := _nominal(cut)) in AIMS and name == "path router tuned" else ""
    cells = [
        cut,
        name,
        f"{before['perplexity']:.3f}" if before else "",
        f"**{row['perplexity']:.3f}**",
        f"{row['perplexity'] / dense['perplexity']:.3f}",
        aim,
        f"{row['active_share']:.3f}",
        f"{row['tokens']:,}",
        f"{row['seconds'] / 60:.1f}",
        f"{row['cpu_seconds'] / 3600:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _nominal(cut: str) -> float | None:
    """The share of the FFN that a cut's name says is active."""
    if not cut:
        return None
    experts, shared, active = cut_of(cut)
    return (shared + active) / experts


def _notes(rows: Rows, options: dict[str, Any]) -> list[str]:
    tunings = [r for r in rows if r["row"] in ("dense tuned", ALONE, *TUNED)]
    hours = sum(r["cpu_seconds"] for r in tunings) / 3600
    return [
        "Perplexity per document, BOS prepended, truncated to the context. One seed. Layer-wise: recipe `capture`,"
        " gates fitted in closed form on 64 windows of 512 tokens; routers are trained on 200,000 tokens. One"
        " index: a router with one choice for all layers, on the same experts renumbered so that equal numbers go"
        " together. Read-ME: one expert per domain (no shared expert, one active), distilled router, one index."
        " Tuned: down projections fitted in closed form (routed models), then all weights and the router by the"
        " defaults of `pregate tune` (--tokens of the table) against the untuned dense parent, as are the parent's own;"
        f" the best of looks every {options['eval_every']} steps; tokens are those up to the end of the run."
        " A twentieth of the training text is validation and nothing else."
        f" CPU of all tunings: {hours:.1f} hours.",
    ]


def _picture(rows: Rows, models: list[str], path: Path) -> None:
    if (plt := pyplot()) is None:
        return
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4.4), squeeze=False)
    for model, axis in zip(models, axes[0], strict=True):
        _panel(axis, [r for r in rows if r["model"] == model], model)
        axis.yaxis.set_major_formatter(plt.LogFormatter())
        axis.yaxis.set_minor_formatter(plt.LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _panel(axis: Any, rows: Rows, model: str) -> None:
    dense, dense_tuned = _one(rows, "dense"), _one(rows, "dense tuned")
    if dense is None:
        return
    for name in (*FREE, "Read-ME", *TUNED):
        base = dense_tuned if name in TUNED else dense
        found = sorted((r for r in rows if r["row"] == name and r["cut"].endswith("E8")), key=lambda r: r["cut"])
        if not found or base is None:
            continue
        shares = [100 * r["active_share"] for r in found]
        style: dict[str, Any] = {"marker": "o", "linestyle": ":"}
        if name in TUNED:  # hollow and each of another size, as some lie on each other
            size = 10 - 3 * TUNED.index(name)
            style = {"marker": "s", "linestyle": "-", "markerfacecolor": "none", "markersize": size}
        axis.plot(shares, [r["perplexity"] / base["perplexity"] for r in found], label=name, **style)
    axis.axhline(1.0, color="grey", linewidth=0.8)
    axis.set(
        title=f"{model}, cuts of 8 experts",
        xlabel="share of the FFN active, %",
        ylabel="perplexity / dense (tuned: / dense tuned)",
    )
    axis.set_yscale("log")
    axis.legend(fontsize=8)
