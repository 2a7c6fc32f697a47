"""`pregate report`: one page to decide from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pregate.base.errors import UserError
from pregate.base.strict_json import strict_json
from pregate.cli.model import ModelOption, SeedOption, TextFieldOption


def report(
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", help="HTML file to write; must not exist.", show_default=False)],
    text: Annotated[
        list[Path], typer.Option(help="Held-out text: .txt, .jsonl or folders of them.", show_default=False)
    ],
    compare: Annotated[
        list[Path] | None,
        typer.Option(help="Another checkpoint or dense model to show beside it; repeatable.", show_default=False),
    ] = None,
    parent: Annotated[
        Path | None,
        typer.Option(help="The dense parent; without, the one the manifest names if it is there.", show_default=False),
    ] = None,
    tuned_parent: Annotated[
        Path | None,
        typer.Option(
            help="The dense parent, tuned as a tuned --model was: what its verdict compares with.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[str, typer.Option(help="Measure on at most so many tokens, or all.")] = "10000",
    seed: SeedOption = 0,
    text_field: TextFieldOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as one JSON object too.")] = False,
) -> None:
    """Measure a routed checkpoint and write one self-contained HTML page: quality, load, flows, agreement, repeats."""
    from pregate.convert.progress import RichProgress
    from pregate.convert.report.options import ReportOptions
    from pregate.convert.report.run import report as run
    from pregate.convert.report.words import headline
    from pregate.model.quiet import quiet_transformers

    quiet_transformers()
    most, others = _tokens(max_tokens), tuple(compare or ())
    options = ReportOptions(model, out, tuple(text), others, parent, tuned_parent, most, seed, text_field)
    figures = run(options, RichProgress())
    if as_json:
        typer.echo(strict_json(figures.to_dict()))
        return
    typer.echo(headline(figures))
    typer.echo(f"written: {out}")


def _tokens(value: str) -> int | None:
    if value == "all":
        return None
    if not value.isdecimal():
        raise UserError.of("--max-tokens", value, "allowed: 1 or more, or all")
    return int(value)
