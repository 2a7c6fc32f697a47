"""The page of a report, from `templates`: one file, no script, nothing loaded; the policy in its head forbids it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pregate.convert.measure import control_table
from pregate.convert.report import charts, words
from pregate.convert.report.figures import Figures
from pregate.model.router_flops import MAX_SHARE  # noqa: F401 (for templates)

#: Widths that charts are drawn in; the style sheet shows one of them, so that their text keeps its size.
WIDE, NARROW = 880, 350
#: Read-ME's measurement of its own model, one index for all layers (its section 4; 2921 of 4096 tokens).
READ_ME_REPEATS = 0.71
#: Below this many tokens a report says that its sample is small.
SMALL_SAMPLE_TOKENS = 20_000
#: At most so many pairs of layers have their flow drawn; of layers of more than `MANY_EXPERTS`, `FEW_FLOWS`.
MAX_FLOWS, FEW_FLOWS, MANY_EXPERTS = 6, 3, 32


def render(figures: Figures, template: str = "page.html") -> str:
    """The whole page as HTML text, or one part of it."""
    quality, manifest = figures.quality, json.dumps(figures.manifest, indent=1, sort_keys=True)
    shown = {
        "f": figures,
        "quality": quality,
        "own": quality.own_point,
        "model": figures.model,
        "manifest_json": manifest,
    }
    return _environment().get_template(template).render(shown)


@cache
def _environment() -> Environment:
    """The templates, which may use every name of these modules and of this one."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates"), encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        lstrip_blocks=True,
    )
    filters = (words.percent, words.number, words.size, words.count, words.even_shade, unbroken)
    environment.filters |= {filter_.__name__: filter_ for filter_ in filters}
    environment.globals |= vars(control_table) | vars(words) | vars(charts) | globals()
    return environment


def both(draw: Callable[[Figures, int], Markup], figures: Figures) -> Markup:
    """The picture for wide and for narrow screens."""
    pictures = (("wide", draw(figures, WIDE)), ("narrow", draw(figures, NARROW)))
    return Markup("").join(Markup('<div class="{}">{}</div>').format(name, picture) for name, picture in pictures)


def unbroken(markup: str) -> Markup:
    """No line ends between a number and its unit."""
    return Markup(re.sub(r"(\d) (?=%|[KMG]?B\b)", "\\1\N{NO-BREAK SPACE}", markup))
