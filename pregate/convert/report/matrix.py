"""Heat maps as SVG text: cells coloured by how far a value lies from what would be even or expected.

Up to `MAX_CELLS` cells are elements with a tooltip each; of more, those of one colour are one path, and a row has one
tooltip. That keeps 32 layers of 64 experts at tens of kilobytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pregate.convert.report.svg import CHAR_WIDTH, element, label, svg, tooltip

MAX_CELLS = 600
#: Cells narrower than this hold no number.
NUMBER_WIDTH = 32


@dataclass(frozen=True)
class Cell:
    """A cell: colour class (n3 to n1 below, z even, p1 to p3 above), the number written in it, and its tooltip."""

    cls: str
    shown: str
    note: str


def shade(value: float, limits: tuple[float, float, float]) -> str:
    """Colour class of a difference: z below the first limit, then 1 to 3; n for less, p for more.

    Example: limits (1, 2, 5): 0.5 -> "z", 3 -> "p2", -6 -> "n3".
    """
    level = sum(abs(value) >= limit for limit in limits)
    return f"{'p' if value > 0 else 'n'}{level}" if level else "z"


def heat_map(
    what: str,
    rows: Sequence[tuple[str, Sequence[Cell]]],
    width: int,
    column_title: str,
    row_title: str = "",
    cell_height: int | None = None,
    row_notes: Sequence[str] = (),
) -> str:
    """Rows of cells with a name each; columns are numbered from 0. Rows may differ in length.

    `row_notes`: the tooltip of each row where cells have none of their own.
    """
    num_columns = max(len(cells) for _, cells in rows)
    left = max([len(name) for name, _ in rows] + [len(row_title)]) * CHAR_WIDTH + 8
    size = min(76.0, (width - left - 1) / num_columns)
    tall = cell_height or (26 if size >= NUMBER_WIDTH else max(8, min(18, round(size))))
    top = 36
    parts = [label(left, 12, column_title, "axis"), label(left - 8, 30, row_title, "axis", "end")]
    stride = max(1, -(-round(CHAR_WIDTH * len(str(num_columns - 1)) + 6) // max(1, int(size))))
    parts += [label(left + (j + 0.5) * size, 30, str(j), "tick", "middle") for j in range(0, num_columns, stride)]
    name_stride = max(1, -(-13 // tall))
    for i, (name, _) in enumerate(rows):
        if i % name_stride == 0:
            parts.append(label(left - 8, top + (i + 0.5) * tall + 4, name, "tick", "end"))
    if sum(len(cells) for _, cells in rows) <= MAX_CELLS:
        parts += [
            _cell(c, left + j * size, top + i * tall, size, tall)
            for i, (_, r) in enumerate(rows)
            for j, c in enumerate(r)
        ]
    else:
        parts.append(_merged([cells for _, cells in rows], left, top, size, tall))
        parts += [_row_note(note, left, top + i * tall, num_columns * size, tall) for i, note in enumerate(row_notes)]
    return svg(round(left + num_columns * size + 1, 1), top + len(rows) * tall + 2, what, *parts)


def _cell(cell: Cell, x: float, y: float, size: float, tall: float) -> str:
    box = element(
        "rect", {"x": x, "y": y, "width": size, "height": tall, "cls": f"cell {cell.cls}"}, tooltip(cell.note)
    )
    if size < NUMBER_WIDTH:
        return box
    return box + label(x + size / 2, y + tall / 2 + 4, cell.shown, f"in {cell.cls}", "middle")


def _merged(rows: Sequence[Sequence[Cell]], left: float, top: float, size: float, tall: float) -> str:
    """One path per colour in units of cells, neighbours of one colour in a row joined."""
    strokes: dict[str, list[str]] = {}
    for i, cells in enumerate(rows):
        start = 0
        for j in range(1, len(cells) + 1):
            if j == len(cells) or cells[j].cls != cells[start].cls:
                strokes.setdefault(cells[start].cls, []).append(f"M{start} {i}h{j - start}v1h-{j - start}z")
                start = j
    paths = [element("path", {"d": "".join(d), "cls": f"cell {cls}"}) for cls, d in sorted(strokes.items())]
    place = f"translate({left:.1f} {top}) scale({size:.3f} {tall})"
    return element("g", {"transform": place, "cls": "merged"}, *paths)


def _row_note(note: str, x: float, y: float, width: float, tall: float) -> str:
    return element("rect", {"x": x, "y": y, "width": width, "height": tall, "cls": "over"}, tooltip(note))
