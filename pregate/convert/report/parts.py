"""What the sections of a report's page share: tables, the line of conditions, colours that say how even a share is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pregate.convert.report.figures import Figures
from pregate.convert.report.matrix import shade

#: A share is drawn as even up to the first relative difference; its colour grows at each of the others.
EVEN_LIMITS = (0.05, 0.25, 1.0)


def conditions(figures: Figures, more: str = "") -> str:
    """The line under each section: text, tokens, seed, date. `more` is markup."""
    c = figures.conditions
    files = ", ".join(escape(path.rsplit("/", 1)[-1]) for path in c.text)
    sentence = (
        f"Measured on {c.num_tokens:,} tokens of {c.num_documents:,} documents of {files}, each cut to "
        f"{c.context_tokens:,} tokens, begin-of-text given and not scored; seed {c.seed}; {escape(c.date)}."
    )
    return f"<p class='conditions'>{sentence}{' ' + more if more else ''}</p>"


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table of plain column names and rows made by `row`."""
    cells = "".join(f"<th scope='col'>{escape(word)}</th>" for word in head)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def row(cells: Sequence[str], cls: str = "") -> str:
    """One table row of markup cells."""
    mark = f" class='{cls}'" if cls else ""
    return f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def even_shade(share: float, even: float) -> str:
    """Colour class of a share beside what would be even; the strongest "below" only for none at all.

    Example: 0.3 beside 0.2 is half as much again: "p2"; 0.01 beside 0.2: "n2"; 0 beside 0.2: "n3".
    """
    if not even:
        return "z"
    return "n3" if share == 0 else shade(max(share / even - 1, -0.99), EVEN_LIMITS)


def even_legend(even: str) -> str:
    """The keys of `even_shade`'s colours; `even` says what a share is held to."""
    keys = (
        ("n3", "none"),
        ("n2", f"over 25 % below {even}"),
        ("n1", "5 to 25 % below"),
        ("z", "within 5 %"),
        ("p1", "5 to 25 % above"),
        ("p2", "25 to 100 % above"),
        ("p3", "twice as much or more"),
    )
    spans = "".join(f"<span><i class='key {cls}'></i>{escape(words)}</span>" for cls, words in keys)
    return f"<div class='legend'>{spans}</div>"
