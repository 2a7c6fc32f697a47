"""`pregate report`: one page to decide from."""

from __future__ import annotations

import typer

from pregate.base.strict_json import strict_json
from pregate.cli.flags import command
from pregate.cli.printed import Output, loading
from pregate.convert.report.options import ReportOptions


@command(ReportOptions, Output)
def report(options: ReportOptions, output: Output) -> None:
    """Measure a routed checkpoint and write one self-contained HTML page: quality, load, flows, agreement, repeats."""
    with loading() as progress:
        from pregate.convert.report.run import report as run
        from pregate.convert.report.words import headline
    figures = run(options, progress)
    if output.json:
        typer.echo(strict_json(figures.to_dict()))
        return
    typer.echo(headline(figures))
    typer.echo(f"written: {options.out}")
