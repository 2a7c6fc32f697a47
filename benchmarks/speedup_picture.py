"""The picture of benchmarks/kernels.py: speed-up over dense against tokens, as SVG, with no plotting library."""

from __future__ import annotations

import math
from typing import Any

COLOURS = {25: "#1b6ca8", 50: "#c8553d", 75: "#5a8f29"}
PANEL_WIDTH, PANEL_HEIGHT, MARGIN = 300, 300, 52


def draw(report: dict[str, Any]) -> str:
    """Return the SVG: one panel per shape, uniform routing.

    Full lines: over dense run by the framework. Thin lines: over dense run with our own products. Dashed: the ideal,
    1 over the active share. Grey below 1: nothing is gained.
    """
    shapes = list(dict.fromkeys(cell["shape"] for cell in report["cells"]))
    width = len(shapes) * (PANEL_WIDTH + MARGIN) + MARGIN
    body = "".join(_panel(report, shape, MARGIN + n * (PANEL_WIDTH + MARGIN)) for n, shape in enumerate(shapes))
    title = f"Speed-up of one FFN layer over dense, {report['device']}, {report['dtype']}, uniform routing"
    legend = "".join(
        f'<text x="{MARGIN + n * 130}" y="{PANEL_HEIGHT + 112}" fill="{colour}">{percent} % active</text>'
        for n, (percent, colour) in enumerate(COLOURS.items())
    )
    note = "thick: over dense as torch runs it; thin: over dense with our products; dashed: ideal; grey: no gain"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{PANEL_HEIGHT + 150}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{MARGIN}" y="22" font-size="14">{title}</text>{body}{legend}'
        f'<text x="{MARGIN}" y="{PANEL_HEIGHT + 134}" fill="#555">{note}</text></svg>\n'
    )


def _panel(report: dict[str, Any], shape: str, left: int) -> str:
    cells = [c for c in report["cells"] if c["shape"] == shape and c["routing"] == "uniform"]
    tokens = sorted({c["tokens"] for c in cells})
    top_value = max(4.0, *(c["speedup_over_dense"] for c in cells))
    highest, lowest = math.log2(top_value * 1.1), -1.5
    right_most = max(math.log2(tokens[-1]), 1.0)

    def x(token: float) -> float:
        return left + PANEL_WIDTH * math.log2(token) / right_most

    def y(value: float) -> float:
        share = (math.log2(max(value, 2**lowest)) - lowest) / (highest - lowest)
        return 50 + PANEL_HEIGHT * (1 - share)

    parts = [
        f'<rect x="{left}" y="{y(1):.1f}" width="{PANEL_WIDTH}" height="{y(0.01) - y(1):.1f}" fill="#e8e8e8"/>',
        f'<rect x="{left}" y="50" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}" fill="none" stroke="#888"/>',
        f'<text x="{left + 6}" y="66">{shape}</text>',
    ]
    parts += [
        f'<text x="{x(t):.1f}" y="{PANEL_HEIGHT + 66}" text-anchor="middle" font-size="10">{t}</text>' for t in tokens
    ]
    parts += [
        f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end" font-size="10">{v:g}</text>'
        for v in (0.5, 1, 2, 4, 8, 16)
        if lowest < math.log2(v) < highest
    ]
    parts.append(f'<text x="{left + PANEL_WIDTH / 2}" y="{PANEL_HEIGHT + 84}" text-anchor="middle">tokens</text>')
    for percent, colour in COLOURS.items():
        ideal = 100 / percent
        parts.append(
            f'<line x1="{left}" x2="{left + PANEL_WIDTH}" y1="{y(ideal):.1f}" y2="{y(ideal):.1f}" '
            f'stroke="{colour}" stroke-dasharray="5 4"/>'
        )
        for key, stroke in (("speedup_over_dense", 2.5), ("speedup_over_dense_same_products", 1)):
            points = sorted((c["tokens"], c[key]) for c in cells if c["percent"] == percent)
            line = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{stroke}"/>')
    return "".join(parts)
