"""The results of benchmarks/kernels.py as Markdown: speed-ups, shares of the machine's bounds, and what is missing."""

from __future__ import annotations

from typing import Any

from benchmarks.surroundings import sentence

GPU_COMMAND = "python -m benchmarks.kernels --device cuda --dtype bfloat16 --out benchmarks/results/kernels_cuda.json"
OTHERS = ("grouped_mm", "loop", "transformers grouped", "transformers batched")


def tables(report: dict[str, Any]) -> str:
    """Return the page: one table per shape for uniform routing, one for the other routings, the GPU's last."""
    bounds = ", ".join(f"{name} {value:.0f}" for name, value in report["ceilings"].items())
    parts = [
        f"# One FFN layer: experts beside dense, {report['device']}, {report['dtype']}",
        f"{sentence(report)}, {report['load_average_after']:.2f} after; {report['instructions']}; "
        f"{report['seconds']} s. Clock: {report['clock']}. Measured bounds: {bounds}.",
        "8 slices, one shared. `x dense`: over the dense FFN as torch runs it; `x same`: over the dense FFN with our "
        "own products, which is what the cut alone gives (ideal 4, 2, 1.33). `best other`: the fastest of "
        f"{', '.join(OTHERS)}. `copy`, `matmul`: weight bytes and useful operations per second over the bounds. "
        "`metadata`: ms per layer to sort the step, not in the other columns.",
    ]
    shapes = dict.fromkeys(cell["shape"] for cell in report["cells"])
    parts += [_shape_table(report, shape) for shape in shapes]
    parts.append(_routing_table(report))
    if report["left_out"]:
        parts.append(f"Left out by --max-gflop: {'; '.join(report['left_out'])}.")
    if report["device"] == "cpu":
        parts.append(f"## GPU\n\nNot measured: no CUDA device at hand. To measure: `{GPU_COMMAND}`")
    return "\n\n".join(parts) + "\n"


def _best_other(cell: dict[str, Any]) -> float:
    return min(cell["ms"][name] for name in OTHERS if name in cell["ms"])


def _shape_table(report: dict[str, Any], shape: str) -> str:
    cells = [c for c in report["cells"] if c["shape"] == shape and c["routing"] == "uniform"]
    lines = [
        f"## {shape}, uniform routing, `{cells[0]['implementation']}`",
        "",
        "| tokens | active | dense ms | ours ms | x dense | x same | best other ms | copy | matmul | metadata |",
        "| --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {c['tokens']} | {c['percent']} % | {c['ms']['dense']:.3g} | {c['ms']['pregate']:.3g} "
        f"| {c['speedup_over_dense']:.2f} | {c['speedup_over_dense_same_products']:.2f} | {_best_other(c):.3g} "
        f"| {c['share_of_copy']:.2f} | {c['share_of_matmul']:.2f} | {c['metadata_ms_per_layer']:.3f} |"
        for c in cells
    ]
    return "\n".join(lines)


def _routing_table(report: dict[str, Any]) -> str:
    """Ours in ms, 25 % active: what the routing changes. `grouped`: a batch of tokens that share one path."""
    cells = {(c["shape"], c["tokens"], c["routing"]): c["ms"]["pregate"] for c in report["cells"] if c["percent"] == 25}
    lines = [
        "## Routing, 25 % active, ours in ms",
        "",
        "| shape | tokens | uniform | Zipf | one path |",
        "| --- | --: | --: | --: | --: |",
    ]
    for shape, tokens in dict.fromkeys((shape, tokens) for shape, tokens, _ in cells):
        taken_ms = [cells.get((shape, tokens, routing)) for routing in ("uniform", "zipf", "grouped")]
        values = " | ".join("not measured" if ms is None else f"{ms:.3g}" for ms in taken_ms)
        lines.append(f"| {shape} | {tokens} | {values} |")
    return "\n".join(lines)
