"""What commands print of what they measured, and of an interrupted run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field

from pregate.base.options import options
from pregate.convert.progress import RichProgress


@options()
class Output:
    """How the result is printed."""

    json: Annotated[bool, Field(description="Print one JSON object.")] = False


def print_figures(figures: dict[str, Any], indent: str = "") -> None:
    """One line per figure, those of a group indented below its name."""
    for name, value in figures.items():
        if isinstance(value, dict):
            typer.echo(f"{indent}{name}")
            print_figures(value, indent + "  ")
        else:
            typer.echo(f"{indent}{name:<28} {value}")


@contextmanager
def loading() -> Iterator[RichProgress]:
    """Bars on stderr for a command's work, which the block imports: the first is of that, for it takes seconds.
    Transformers says nothing beside them."""
    progress = RichProgress()
    with progress.doing("loading torch and transformers"):
        yield progress
        from pregate.model.quiet import quiet_transformers

        quiet_transformers()


@contextmanager
def say_if_interrupted(describe: Callable[[Path], str], out: Path) -> Iterator[None]:
    """On Ctrl-C say what is left of the run and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"pregate: {describe(out)}", err=True)
        raise typer.Exit(130) from None


def print_written(out: Path, figures: dict[str, Any]) -> None:
    """What was measured of what was written to `out`."""
    print_figures(figures)
    typer.echo(f"written: {out}")
