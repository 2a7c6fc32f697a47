"""Table and picture of `benchmarks.engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.surroundings import sentence


def write_report(results: dict[str, Any], out: Path) -> None:
    """Write the Markdown table and the picture beside `out`."""
    best = {name: {count: max(runs) for count, runs in row.items()} for name, row in results["tokens_per_s"].items()}
    counts = list(next(iter(best.values())))
    yardstick = best.get("vLLM, dense")
    lines = [
        "# The engine beside its peers",
        "",
        f"{sentence(results)}. One thread a process, fp32; new tokens per second with",
        f"{', '.join(counts)} requests at once, prefill included, the best of all rounds;",
        "in brackets over vLLM's dense parent in this run.",
        "",
        "| who | " + " | ".join(counts) + " | resident MB | start s |",
        "| --- | " + "--: | " * (len(counts) + 2),
    ]
    for name, row in best.items():
        cells = [_cell(row[count], yardstick[count] if yardstick else None) for count in counts]
        memory, start = results["resident_bytes"].get(name), results["start_s"].get(name)
        further = f" | {memory / 1e6:.0f} | {start:.1f} |" if memory and start else " | | |"
        lines.append(f"| {name} | " + " | ".join(cells) + further)
    bounds = results["bounds"]
    lines += [
        "",
        f"One thread of this machine reads {bounds['bytes_per_s'] / 1e9:.1f} GB/s and multiplies at "
        f"{bounds['flops_per_s'] / 1e9:.0f} GFLOP/s (fp32, measured in the same run). That allows of decoding alone,",
        "without prefill, cache, sampling and Python, whichever is less:",
        "",
        "| bound | " + " | ".join(counts) + " |",
        "| --- | " + "--: | " * len(counts),
        *(
            f"| {name} | " + " | ".join(f"{row[c]:.0f}" for c in counts) + " |"
            for name, row in results["decode_bounds"].items()
        ),
    ]
    for name, roles in results["held_bytes"].items():
        held = ", ".join(f"{role} {held / 1e6:.0f}" for role, held in sorted(roles.items(), key=lambda item: -item[1]))
        began = ", ".join(f"{stage} {second:.1f}" for stage, second in results["stages_s"][name].items())
        lines += ["", f"{name}: MB by role (PSS, after the run): {held}. Stages of the start, by the second: {began};"]
        lines += [f"the first token after {results['start_s'][name]:.1f} s."]
    if results["lean_step"]:
        lines += ["", "A bare decode step (`lean_step.py`: no prefill, sampling or routing), tokens/s:", ""]
        lines += ["| share of the FFN | batch | tokens/s |", "| --: | --: | --: |"]
        lines += ["| {} % | {} | {:.0f} |".format(*key.split(), value) for key, value in results["lean_step"].items()]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    _picture(best, counts, out.with_suffix(".png"))


def _cell(speed: float, yardstick: float | None) -> str:
    return f"{speed:.1f}" + (f" ({speed / yardstick:.2f})" if yardstick else "")


def _picture(best: dict[str, dict[str, float]], counts: list[str], path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(best)
    for place, (name, row) in enumerate(best.items()):
        axes.bar([n + place * width for n in range(len(counts))], [row[c] for c in counts], width, label=name)
    axes.set_xticks([n + 0.4 for n in range(len(counts))], [f"{count} requests" for count in counts])
    axes.set_ylabel("new tokens per second")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
