"""`pregate export`: a routed checkpoint as a folder that needs no pregate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pregate.cli.model import ModelOption, OutOption, TextFieldOption, report


def export(
    model: ModelOption,
    out: OutOption,
    format: Annotated[  # noqa: A002 (the option's name)
        str, typer.Option("--format", help="qwen2_moe: a stock mixture class; dense: the parent.", show_default=False)
    ],
    text: Annotated[
        list[Path] | None, typer.Option(help="Held-out text to measure on; without, random tokens.", show_default=False)
    ] = None,
    text_field: TextFieldOption = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Measure on at most so many tokens.", show_default=False)
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(help="Largest weight of every gate; without, found by measurement.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; without, as stored.", show_default=False)
    ] = None,
) -> None:
    """Write a checkpoint as stock Qwen2-MoE and measure the difference, or give the dense parent back."""
    from pregate.convert.export.run import ExportOptions
    from pregate.convert.export.run import export as run
    from pregate.convert.progress import RichProgress
    from pregate.model.quiet import quiet_transformers

    quiet_transformers()
    options = ExportOptions(
        model,
        out,
        format,
        text=tuple(text or ()),
        scale=scale,
        dtype=dtype,
        max_tokens=max_tokens,
        text_field=text_field,
    )
    report(out, run(options, RichProgress()))
