"""`pregate convert`, `decouple`, `tune`, `evaluate`, `export`: from a dense model to a routed checkpoint and back."""

from __future__ import annotations

import re
from contextlib import suppress

import typer

from pregate.base.strict_json import strict_json
from pregate.cli.flags import command
from pregate.cli.printed import (
    Output,
    loading,
    print_figures,
    print_written,
    say_if_interrupted,
)
from pregate.convert.cut.options import RECIPES, ConvertOptions
from pregate.convert.export.apply import ApplyOptions
from pregate.convert.export.options import ExportOptions
from pregate.convert.measure.options import EvaluateOptions
from pregate.convert.paths.options import DecoupleOptions
from pregate.convert.tune.options import TuneOptions
from pregate.model.shard_file import ShardFile, weight_files

_DOWN_PROJECTION = re.compile(r"(model\.)?layers\.\d+\.mlp\.down_proj\.weight")


def describe_recipes() -> str:
    """Every recipe's values, a paragraph each: all of capture's, of the others what differs."""
    default = vars(RECIPES["capture"])
    parts = []
    for name, recipe in RECIPES.items():
        values = {k: v for k, v in vars(recipe).items() if name == "capture" or v != default[k]}
        parts.append(f"Recipe {name}: " + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in values.items()) + ".")
    return "\n\n".join(parts)


@command(ConvertOptions)
def convert(options: ConvertOptions) -> None:
    """Cut a dense model's FFNs into shared and routed experts, without training. Interrupted, it can go on."""
    _check_widths(options)
    with loading() as progress:
        from pregate.convert.cut.conversion import convert as run
        from pregate.convert.files.partial import interrupted
    with say_if_interrupted(interrupted, options.out):
        figures = run(options, progress).figures
    print_written(options.out, figures)


def _check_widths(options: ConvertOptions) -> None:
    """UserError where the experts do not divide an FFN whose width the names and shapes of tensors tell at once; the
    conversion looks at every layer, with torch, which takes seconds to load."""
    shapes: dict[str, tuple[int, ...]] = {}
    with suppress(OSError, ValueError):  # a GGUF file; what cannot be read the conversion refuses by its reason
        for path in weight_files(options.model):
            shapes |= {name: stored.shape for name, stored in ShardFile(path).tensors.items()}
    for width in sorted({shape[-1] for name, shape in shapes.items() if shape and _DOWN_PROJECTION.fullmatch(name)}):
        options.check_width(width)


@command(DecoupleOptions)
def decouple(options: DecoupleOptions) -> None:
    """Train a path router for a layer-wise checkpoint: exact paths, a forecast, or paths known after some layers
    (--read-layers). Interrupted, it can go on."""
    with loading() as progress:
        from pregate.convert.files.partial import interrupted
        from pregate.convert.paths.decouple import decouple as run
    with say_if_interrupted(interrupted, options.out):
        figures = run(options, progress).figures["decouple"]  # the others were measured on another text
    print_written(options.out, figures)


@command(TuneOptions)
def tune(options: TuneOptions) -> None:
    """Tune a checkpoint under its own routing (or a dense model, the control). Interrupted, it can go on."""
    with loading() as progress:
        from pregate.convert.files.partial import interrupted
        from pregate.convert.tune.run import tune as run
    with say_if_interrupted(interrupted, options.out):
        figures = run(options, progress).figures["tune"]
    print_written(options.out, figures)


@command(ExportOptions)
def export(options: ExportOptions) -> None:
    """Write a checkpoint as stock Qwen2-MoE and measure the difference, as an adapter, or as the dense parent again."""
    with loading() as progress:
        from pregate.convert.export.run import export as run
    print_written(options.out, run(options, progress))


@command(ApplyOptions)
def apply(options: ApplyOptions) -> None:
    """Write the checkpoint that an adapter makes with its dense parent, bit for bit."""
    with loading() as progress:
        from pregate.convert.export.apply import apply as run
    print_written(options.out, run(options, progress))


@command(EvaluateOptions, Output)
def evaluate(options: EvaluateOptions, output: Output) -> None:
    """Perplexity and bits per byte; for a routed model also how its routers agree, and --controls."""
    with loading() as progress:
        from pregate.convert.measure.evaluate import evaluate as run
    result = run(options, progress)
    if output.json:
        typer.echo(strict_json(result))
        return
    rows = result.pop("controls", None)
    print_figures(result)
    if rows:
        _print_controls(rows)


def _print_controls(rows: dict[str, dict[str, float]]) -> None:
    """One line per control: perplexity, its ratio to dense, bits per byte, active share, agreement with the oracle."""
    columns = ("perplexity", "ratio_to_dense", "bits_per_byte", "active_share", "same_set", "mean_overlap")
    typer.echo(f"\n{'':<24}" + "".join(f"{name:>16}" for name in columns))
    for name, row in rows.items():
        typer.echo(f"{name:<24}" + "".join(f"{row[c]:>16.4f}" if c in row else " " * 16 for c in columns))
    typer.echo("same_set: how often a token gets the oracle's experts in a layer; mean_overlap: the share in common")
