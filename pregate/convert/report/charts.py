"""Charts of a report as inline SVG, drawn by matplotlib; its colours become the page's, light and dark.

What a mark shows is a title of its own, which a browser shows over it. The same figures give the same bytes.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from math import ceil, floor, isfinite, log10
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from pregate.convert.measure.control_table import (
    DENSE,
    LINEAR,
    ORACLE,
    ORACLE_FIXED,
    PAPER,
    PATH,
    RANDOM,
    READ,
    STATIC,
)
from pregate.convert.report.figures import Agreement, Figures
from pregate.convert.report.training import TrainingCurve
from pregate.convert.report.words import number, percent

#: The style sheet's colours: what matplotlib draws in, and the variable that stands in its place on the page.
COLOURS = {
    **{"c0": "#0072b2", "c1": "#00805c", "c2": "#b35300", "c3": "#a34a80", "c4": "#6b7178", "c5": "#7a6a00"},
    **{"ink": "#1d2126", "soft": "#586069", "rule": "#dcdfe3", "card": "#fffffe"},
}
COLOUR_OF = {
    **{DENSE: "c4", STATIC: "c3", RANDOM: "c4", PAPER: "c5", LINEAR: "c2"},
    **{PATH: "c0", READ: "c0", ORACLE: "c1", ORACLE_FIXED: "c1"},
}
OTHER_COLOUR = "c5"
#: Pairs of routers in the order of the table, and their colours.
PAIRS = {("path", "oracle"): "c0", ("gate", "oracle"): "c2", ("path", "gate"): "c3"}
#: Mean width of a character of the charts' text, measured in Chromium at 12 px with DejaVu Sans, a wide face.
CHAR_WIDTH = 7.0
LINE_HEIGHT = 17.0
#: Room left of the axes.
LEFT = 52
SETTINGS: dict[Any, Any] = {
    **{"svg.fonttype": "none", "text.parse_math": False, "font.size": 12},
    **{"text.color": COLOURS["ink"], "axes.labelcolor": COLOURS["soft"], "axes.edgecolor": COLOURS["rule"]},
    **{"xtick.color": COLOURS["rule"], "ytick.color": COLOURS["rule"], "grid.color": COLOURS["rule"]},
    **{"xtick.labelcolor": COLOURS["soft"], "ytick.labelcolor": COLOURS["soft"], "ytick.major.size": 0},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.facecolor": "none"},
    **{"lines.linewidth": 2, "lines.markersize": 8, "font.family": "DejaVu Sans"},
}


def _drawn(draw: Callable[..., Markup]) -> Callable[..., Markup]:
    """`draw` with matplotlib as reports want it, and without its words on fonts and glyphs."""

    @wraps(draw)
    def with_settings(*args: Any) -> Markup:
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        import matplotlib as mpl

        with mpl.rc_context(SETTINGS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return draw(*args)

    return with_settings


class Chart:
    """Axes of a size in pixels whose marks have notes; names stand at the right, each joined to its mark."""

    def __init__(self, what: str, width: int, height: int, labels: Sequence[str] = ()) -> None:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        mpl.rcParams["svg.hashsalt"] = f"{what} {width}"  # no two pictures of a page share an id
        gutter = max(map(len, labels), default=0) * CHAR_WIDTH + (22 if labels else 14)
        self._what, self._width, self._height = what, width - LEFT - gutter, height - 70.0
        self._figure = Figure((width / 72, height / 72), dpi=72)
        FigureCanvasSVG(self._figure)
        place = LEFT / width, 44 / height, self._width / width, self._height / height
        self.axes = self._figure.add_axes(place)
        self.axes.grid(axis="y")
        self._notes: list[Sequence[str]] = []
        self._named: list[tuple[float, float, str, str, bool]] = []

    def titles(self, x: str, y: str) -> None:
        """Say what the axes are; that of `y` stands above."""
        self.axes.set_xlabel(x, weight="bold")
        self.axes.annotate(
            y, (2 - LEFT, self._height + 14), xycoords="axes points", weight="bold", color=COLOURS["soft"]
        )

    def line(self, points: Sequence[tuple[float, float, str]], colour: str, style: str = "-", size: float = 8) -> None:
        """Points (x, y, note) of one colour, joined by a line unless `style` is "None"; of `size` 0: no marks."""
        x, y, notes = zip(*points, strict=True)
        look = {"marker": "o" if size else "", "markersize": size, "markeredgecolor": COLOURS["card"]}
        look |= {"markeredgewidth": 1.5 if size > 4 else 0}
        self.axes.plot(x, y, ls=style, color=COLOURS[colour], clip_on=False, gid=f"notes-{len(self._notes)}", **look)
        self._notes.append(notes)

    def name(self, x: float, y: float, words: str, colour: str, strong: bool = False) -> None:
        """Write `words` at the right, with a line to (x, y)."""
        self._named.append((x, y, words, colour, strong))

    def svg(self) -> Markup:
        """The picture as markup for a page."""
        self.axes.autoscale_view()  # else the scale is not known yet
        to_axes = self.axes.transData + self.axes.transAxes.inverted()
        below = [self._height * (1 - to_axes.transform(named[:2])[1]) for named in self._named]
        order = sorted(range(len(below)), key=below.__getitem__)
        places = spread([below[i] for i in order], LINE_HEIGHT, self._height)
        for i, at in zip(order, places, strict=True):
            x, y, words, colour, strong = self._named[i]
            self.axes.annotate(
                "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words),
                (x, y),
                (self._width + 16, self._height - at),
                textcoords="axes points",
                va="center",
                weight="bold" if strong else "normal",
                arrowprops={"arrowstyle": "-", "color": COLOURS[colour], "alpha": 0.6, "relpos": (0, 0.5)},
                annotation_clip=False,
            )
        out = io.BytesIO()
        self._figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        return _inline(out.getvalue(), self._what, self._notes)


def _inline(drawn: bytes, what: str, notes: Sequence[Sequence[str]]) -> Markup:
    """matplotlib's document as an element of a page: in the page's colours and font, its marks with their notes."""
    root = ElementTree.fromstring(drawn)
    for child in [child for child in root if not child.tag.endswith("}g")]:
        root.remove(child)  # what it says of itself, a style that would be the whole page's, clipping
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.items() if name != "clip-path"}
        style = re.sub(r"font-family: [^;]*; ?", "", element.get("style", ""))
        for name, colour in COLOURS.items():
            style = style.replace(colour, f"var(--{name})")
        element.attrib |= {"style": style} if style else {}
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        if element.get("id", "").startswith("notes-"):
            _put_notes(element, notes[int(element.attrib["id"].removeprefix("notes-"))])
        if element.tag == "g":
            element.attrib.pop("id", None)
    width, height = root.attrib["viewBox"].split()[2:]
    root.attrib = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height, "role": "img"}
    root.set("aria-label", what)
    return Markup(re.sub(r"\s*\n\s*", " ", ElementTree.tostring(root, encoding="unicode")))


def _put_notes(group: ElementTree.Element, notes: Sequence[str]) -> None:
    """Wrap each mark of a line, in order, with its note."""
    marks = [(owner, mark) for owner in group.iter() for mark in owner if mark.tag.endswith("use")]
    for (owner, mark), note in zip(marks, notes, strict=bool(marks)):
        wrapped = ElementTree.Element("g")
        ElementTree.SubElement(wrapped, "title").text = note
        wrapped.append(mark)
        owner[list(owner).index(mark)] = wrapped


def spread(places: Sequence[float], gap: float, high: float) -> list[float]:
    """Move ascending `places` apart to at least `gap`, as near as may be to where they were, within 0 to `high`.

    More than fit keep the gap and run over `high`. Example: [10, 11, 50], gap 5, high 100: [8.0, 13.0, 50.0].
    """
    groups: list[list[float]] = []  # [sum of wished starts, number]: what has to move together
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] + groups[-2][1] * gap > groups[-1][0] / groups[-1][1]:
            total, number = groups.pop()
            groups[-1][0] += total - number * groups[-1][1] * gap
            groups[-1][1] += number
    out = [total / number + i * gap for total, number in groups for i in range(int(number))]
    out = [min(place, high - (len(out) - 1 - i) * gap) for i, place in enumerate(out)]
    return [max(place, i * gap) for i, place in enumerate(out)]


@_drawn
def quality_chart(figures: Figures, width: int) -> Markup:
    """Perplexity against active share: the checkpoint, its controls, other models, other numbers of experts."""
    quality, wide = figures.quality, width > 600
    everything = [*quality.controls, *quality.others, *([quality.tuned_parent] if quality.tuned_parent else [])]
    points = [p for p in everything if isfinite(p.perplexity)]  # the table names them all
    points.sort(key=lambda p: p.name == quality.own)  # the checkpoint is drawn on top
    longest = 24 if wide else 20
    names = {p: p.name if len(p.name) <= longest else f"{p.name[: longest - 1]}…" for p in points}
    labels = {p: f"{names[p]} {number(p.perplexity)}" if wide else names[p] for p in points}
    what = "perplexity against the share of the FFN that runs"
    chart = Chart(what, width, 440 if wide else 380, list(labels.values()))
    values, shares = [p.perplexity for p in points], [p.active_share for p in points]
    for curve in quality.curves:
        ran = [c for c in zip(curve.num_active, curve.active_shares, curve.perplexities, strict=True) if isfinite(c[2])]
        notes = [f"{curve.name}, {n:.3g} routed experts: {_figures_of(share, value)}" for n, share, value in ran]
        line = [(share, value, note) for (_, share, value), note in zip(ran, notes, strict=True)]
        values, shares = values + [value for _, _, value in ran], shares + [share for _, share, _ in ran]
        if not line:
            continue
        chart.line(line, COLOUR_OF.get(curve.name, OTHER_COLOUR), "-" if curve.name == quality.own else "--")
        for n, share, value in ran if curve is quality.curves[0] else []:
            style: dict[str, Any] = {"color": COLOURS["c0"], "weight": "bold", "ha": "right", "va": "top"}
            chart.axes.annotate(f"{n:.2g}", (share, value), (-6, -4), textcoords="offset points", **style)
    _scale(chart.axes, values, shares)
    for p in points:
        colour, strong = COLOUR_OF.get(p.name, OTHER_COLOUR), p.name == quality.own
        chart.line([(p.active_share, p.perplexity, f"{p.name}: {_figures_of(p.active_share, p.perplexity)}")],
                   colour, "None", 12 if strong else 8)  # fmt: skip
        chart.name(p.active_share, p.perplexity, labels[p], colour, strong)
    chart.titles("share of the FFN that runs", "perplexity")
    return chart.svg()


def _figures_of(share: float, perplexity: float) -> str:
    return f"{percent(share)} of the FFN, perplexity {number(perplexity)}"


def _scale(axes: Any, values: Sequence[float], shares: Sequence[float]) -> None:
    """Perplexity by powers with ticks at 1, 2 and 5 times powers of ten; shares from a round number to all."""
    from matplotlib.ticker import MaxNLocator, MultipleLocator, NullLocator

    axes.set_yscale("log")
    low, high = min(values) / 1.08, max(values) * 1.08
    ticks = [m * 10.0**p for p in range(floor(log10(low)), ceil(log10(high)) + 1) for m in (1, 2, 5)]
    ticks = [t for t in ticks if low <= t <= high]
    if len(ticks) > 8:
        ticks = [t for t in ticks if log10(t) % 1 == 0]
    if len(ticks) < 3:
        ticks = [t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:,.0f}" if t >= 10 else f"{t:.3g}" for t in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(low, high)
    axes.set_xlim(min(floor(10 * min(shares)) / 10, 0.9), 1)
    axes.xaxis.set_major_locator(MultipleLocator(0.1 if min(shares) >= 0.6 else 0.2))
    axes.xaxis.set_major_formatter(lambda v, _: percent(v, 0))


@_drawn
def agreement_chart(figures: Figures, width: int) -> Markup:
    """Picks that two of path, gate and oracle have in common, by layer, beside what random experts have."""
    from matplotlib.ticker import MaxNLocator

    def note(a: Agreement) -> str:
        common = f"{percent(a.mean_overlap)} of picks, {percent(a.same_set)} whole sets"
        return f"layer {a.layer}, {a.first} and {a.second}: {common}"

    lines = {pair: [a for a in figures.agreements if (a.first, a.second) == pair] for pair in PAIRS}
    chart = Chart("picks in common by layer", width, 300 if width > 600 else 260, ["random experts"])
    layers = [a.layer for a in figures.agreements]
    random = figures.quality.point(RANDOM)
    if random is not None and random.mean_overlap is not None:
        chance, label = random.mean_overlap, f"random experts: {percent(random.mean_overlap)}"
        chart.line([(min(layers), chance, label), (max(layers), chance, label)], "c4", "--", 0)
        chart.name(max(layers), chance, "random experts", "c4")
    for pair, found in lines.items():
        if found:
            chart.line([(a.layer, a.mean_overlap, note(a)) for a in found], PAIRS[pair])
            chart.name(found[-1].layer, found[-1].mean_overlap, " and ".join(pair), PAIRS[pair])
    chart.axes.set_ylim(top=1)
    chart.axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    chart.axes.yaxis.set_major_locator(MaxNLocator(5))
    chart.axes.yaxis.set_major_formatter(lambda v, _: percent(v, 0))
    chart.titles("layer", "picks in common")
    return chart.svg()


@_drawn
def training_chart(curve: TrainingCurve) -> Markup:
    """One quantity along a training."""
    from matplotlib.ticker import MaxNLocator

    last = number(curve.values[-1])
    chart = Chart(curve.name.replace("_", " "), 420, 200, [last])
    points = [(x, y, f"step {x:,.0f}: {number(y)}") for x, y in zip(curve.steps, curve.values, strict=True)]
    chart.line(points, "c0", size=8 if len(points) < 40 else 3)
    chart.axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    chart.axes.yaxis.set_major_locator(MaxNLocator(4))
    chart.axes.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    chart.axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    chart.name(curve.steps[-1], curve.values[-1], last, "c0")
    chart.titles("step", "")
    return chart.svg()
