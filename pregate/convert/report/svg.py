"""Charts as SVG text: axes, lines and points with labels that do not collide, bars. Pure functions, no script.

Colours are classes that the page's style sheet gives, light and dark (`style.py`): c0 to c7 for series. Sizes
are in pixels of the width asked for: a chart is drawn once wide and once narrow (`both`), so that its text keeps its
size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDE, NARROW = 880, 350
#: Mean width of a character of the charts' text, measured in Chromium at 12 px with DejaVu Sans, a wide face.
CHAR_WIDTH = 7.0
LINE_HEIGHT = 17


def element(tag: str, attributes: Mapping[str, object], *children: str) -> str:
    """One element; attribute values are escaped, `children` are markup already. `cls` stands for class."""
    words = [f'{"class" if k == "cls" else k}="{escape(_plain(v))}"' for k, v in attributes.items() if v is not None]
    head = " ".join([tag, *words])
    return f"<{head}>{''.join(children)}</{tag}>" if children else f"<{head}/>"


def tooltip(sentence: str) -> str:
    """What the browser shows over the element it is put in."""
    return f"<title>{escape(sentence)}</title>"


def label(x: float, y: float, words: str, cls: str = "", anchor: str = "start") -> str:
    """Text with its baseline at `y`."""
    return element("text", {"x": x, "y": y, "cls": cls or None, "text-anchor": anchor}, escape(words))


def svg(width: float, height: float, what: str, *children: str) -> str:
    """A picture that says in words what it shows."""
    box = {"viewBox": f"0 0 {_plain(width)} {_plain(height)}", "width": width, "height": height}
    return element("svg", box | {"role": "img", "aria-label": what}, *children)


def both(draw: Callable[[int], str]) -> str:
    """The picture for wide and for narrow screens; the style sheet shows one of them."""
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


@dataclass(frozen=True)
class Axis:
    """One axis: title with its unit, the range shown, where to write numbers, and how."""

    title: str
    low: float
    high: float
    ticks: tuple[float, ...]
    show: Callable[[float], str]
    log: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies, 0 at the low end and 1 at the high."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Point:
    """A mark: `note` is its tooltip, `name` (if any) is written beside the plot, `tag` (if any) at the mark."""

    x: float
    y: float
    note: str
    name: str = ""
    tag: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one colour; `line` joins them ("solid", "dashed" or none)."""

    cls: str
    points: tuple[Point, ...]
    line: str = ""
    marks: bool = True
    strong: bool = False


def linear_axis(title: str, low: float, high: float, show: Callable[[float], str], num_ticks: int = 5) -> Axis:
    """An axis from `low` to `high`, widened to round numbers.

    Example: 0.375 to 1 with 5 ticks: 0.2, 0.4, 0.6, 0.8, 1.
    """
    span = high - low if high > low else max(abs(high), 1e-9)
    step = _round_step(span / max(1, num_ticks - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return Axis(title, ticks[0], ticks[-1], ticks, show)


def log_axis(title: str, low: float, high: float, show: Callable[[float], str]) -> Axis:
    """A logarithmic axis over positive values with ticks at 1, 2 and 5 times powers of ten."""
    low, high = low / 1.08, max(high, low) * 1.08
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    inside = tuple(t for t in ticks if low <= t <= high)
    if len(inside) > 8:
        inside = tuple(t for t in inside if math.log10(t) % 1 == 0)
    return Axis(title, low, high, inside or (low, high), show, log=True)


def chart(what: str, series: Sequence[Series], x: Axis, y: Axis, width: int, height: int) -> str:
    """Points and lines over two axes; names stand at the right, each joined to its mark by a thin line."""
    named = [(p, s) for s in series for p in s.points if p.name]
    gutter = max([len(p.name) for p, _ in named], default=0) * CHAR_WIDTH + (22 if named else 8)
    left = max(len(y.show(t)) for t in y.ticks) * CHAR_WIDTH + 10
    right, top, bottom = width - gutter, 24, height - 40

    def at(point: Point) -> tuple[float, float]:
        return left + x.place(point.x) * (right - left), bottom - y.place(point.y) * (bottom - top)

    parts = _axes(x, y, left, right, top, bottom)
    parts += [_line(s, [at(p) for p in s.points]) for s in series if s.line]
    parts += _names(named, at, right, top, bottom)
    parts += [_mark(s, p, *at(p)) for s in series for p in s.points if s.marks]
    return svg(width, height, what, *parts)


def _axes(x: Axis, y: Axis, left: float, right: float, top: float, bottom: float) -> list[str]:
    parts = [label(0, 12, y.title, "axis"), label((left + right) / 2, bottom + 36, x.title, "axis", "middle")]
    for tick in y.ticks:
        at = bottom - y.place(tick) * (bottom - top)
        parts.append(element("line", {"x1": left, "x2": right, "y1": at, "y2": at, "cls": "grid"}))
        parts.append(label(left - 6, at + 4, y.show(tick), "tick", "end"))
    room = (right - left) / max(1, max(len(x.show(t)) for t in x.ticks) * CHAR_WIDTH + 8)
    stride = max(1, math.ceil(len(x.ticks) / max(1, room)))
    for tick in x.ticks[::stride]:
        at = left + x.place(tick) * (right - left)
        parts.append(element("line", {"x1": at, "x2": at, "y1": bottom, "y2": bottom + 4, "cls": "grid"}))
        parts.append(label(at, bottom + 18, x.show(tick), "tick", "middle"))
    return parts


def _line(series: Series, places: Sequence[tuple[float, float]]) -> str:
    points = " ".join(f"{_plain(px)},{_plain(py)}" for px, py in places)
    dash = "5 4" if series.line == "dashed" else None
    return element("polyline", {"points": points, "cls": f"line {series.cls}", "stroke-dasharray": dash})


def _mark(series: Series, point: Point, px: float, py: float) -> str:
    radius = 6 if series.strong else 4
    tag = label(px - 7, py + 13, point.tag, "tag", "end") if point.tag else ""
    dot = element("circle", {"cx": px, "cy": py, "r": radius, "cls": f"mark {series.cls}"}, tooltip(point.note))
    return dot + tag


def _names(
    named: Sequence[tuple[Point, Series]],
    at: Callable[[Point], tuple[float, float]],
    right: float,
    top: float,
    bottom: float,
) -> list[str]:
    ordered = sorted(named, key=lambda pair: at(pair[0])[1])
    heights = spread([at(p)[1] for p, _ in ordered], LINE_HEIGHT, top, bottom)
    parts = []
    for (point, series), height in zip(ordered, heights, strict=True):
        px, py = at(point)
        corner = f"{_plain(px)},{_plain(py)} {_plain(right + 4)},{_plain(height)} {_plain(right + 12)},{_plain(height)}"
        parts.append(element("polyline", {"points": corner, "cls": f"leader {series.cls}"}))
        words = label(right + 16, height + 4, point.name, "name strong" if series.strong else "name")
        parts.append(words)
    return parts


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending `places` apart to at least `gap`, as near as may be to where they were, within low to high.

    More than fit between low and high keep the gap and run over high.

    Example: [10, 11, 50], gap 5, 0 to 100: [8.0, 13.0, 50.0].
    """
    groups: list[list[float]] = []  # [sum of wished starts, number, start]
    for place in places:
        groups.append([place, 1, place])
        while len(groups) > 1 and groups[-2][2] + groups[-2][1] * gap > groups[-1][2]:
            total, number, _ = groups.pop()
            before = groups[-1]
            before[0] += total - number * before[1] * gap
            before[1] += number
            before[2] = before[0] / before[1]
    out = [start + i * gap for _, number, start in groups for i in range(int(number))]
    for i in range(len(out) - 1, -1, -1):
        out[i] = min(out[i], high - (len(out) - 1 - i) * gap)
    for i, value in enumerate(out):
        out[i] = max(value, low + i * gap)
    return out


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart: `value` drawn, `shown` written; `tick` marks another value to compare it with."""

    name: str
    value: float
    shown: str
    note: str
    tick: float | None = None


def bars(what: str, rows: Sequence[Bar], width: int, high: float, cls: str = "c0") -> str:
    """Horizontal bars from 0 to `high` with name, value and a tick where there is one to compare with."""
    left = max(len(r.name) for r in rows) * CHAR_WIDTH + 10
    right = width - max(len(r.shown) for r in rows) * CHAR_WIDTH - 12
    step, parts = 22, []
    for index, row in enumerate(rows):
        y, length = index * step + 3, max(0.0, row.value) / high * (right - left)
        parts.append(label(left - 8, y + 13, row.name, "tick", "end"))
        parts.append(element("rect", {"x": left, "y": y, "width": right - left, "height": 16, "cls": "track"}))
        bar = {"x": left, "y": y, "width": length, "height": 16, "cls": f"bar {cls}"}
        parts.append(element("rect", bar, tooltip(row.note)))
        if row.tick is not None:
            at = left + row.tick / high * (right - left)
            parts.append(element("line", {"x1": at, "x2": at, "y1": y - 2, "y2": y + 18, "cls": "mean"}))
        parts.append(label(right + 8, y + 13, row.shown, "name"))
    return svg(width, len(rows) * step + 4, what, *parts)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * 0.999)


def _plain(value: object) -> str:
    """A number without needless digits; other values as they are."""
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return str(value)
