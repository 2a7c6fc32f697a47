"""`pregate convert`, `decouple`, `evaluate`: from a dense model to a routed checkpoint, and what that cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pregate.base.errors import UserError
from pregate.base.strict_json import strict_json
from pregate.cli import method_options as method
from pregate.cli import router_options as router

ModelOption = Annotated[Path, typer.Option("--model", help="Model folder.", show_default=False)]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.", show_default=False)]


TextFieldOption = Annotated[
    str | None,
    typer.Option(
        "--text-field", help="Field of a .jsonl record that is its text; without, by form.", show_default=False
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]


def convert(
    model: ModelOption,
    out: OutOption,
    experts: Annotated[int, typer.Option(help="Experts per layer, shared ones included.", show_default=False)],
    shared: Annotated[
        str, typer.Option(help="Experts that are always on; auto: found for each layer.", show_default=False)
    ],
    active: Annotated[
        int,
        typer.Option(help="Routed experts per token (on average); shared ones too with auto.", show_default=False),
    ],
    calibration: Annotated[
        list[Path], typer.Option(help="Text to profile on: .txt, .jsonl or folders of them.", show_default=False)
    ],
    text_field: TextFieldOption = None,
    recipe: Annotated[str, typer.Option(help="capture, plain, stock or cmoe-paper: defaults of what follows.")] = (
        "capture"
    ),
    clustering: method.Clustering = None,
    shared_by: method.SharedBy = None,
    gate: method.Gate = None,
    selection: method.Selection = None,
    token_power: method.TokenPower = None,
    intercept: method.Intercept = None,
    profile: method.Profile = None,
    marks_per_token: method.MarksPerToken = None,
    distance: method.Distance = None,
    max_iterations: method.MaxIterations = None,
    draw: method.Draw = None,
    samples: method.Samples = None,
    sequence_length: method.SequenceLength = None,
    seed: method.Seed = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16, as stored.")] = "float32",
    device: Annotated[str, typer.Option(help="auto (a GPU when there is one), cpu, cuda or cuda:N.")] = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an interrupted run left.")] = False,
) -> None:
    """Cut a dense model's FFNs into shared and routed experts, without training. Interrupted, it can go on."""
    from pregate.convert.cut.conversion import convert as run
    from pregate.convert.cut.options import ConvertOptions
    from pregate.convert.progress import RichProgress
    from pregate.model.quiet import quiet_transformers

    quiet_transformers()
    given = {
        "clustering": clustering,
        "shared_by": shared_by,
        "gate": gate,
        "selection": selection,
        "token_power": token_power,
        "intercept": intercept,
        "profile": profile,
        "marks_per_token": marks_per_token,
        "distance": distance,
        "max_iterations": max_iterations,
        "draw": draw,
        "samples": samples,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    options = ConvertOptions.of_recipe(
        recipe,
        {name: value for name, value in given.items() if value is not None},
        model=model,
        out=out,
        experts=experts,
        shared=_shared(shared),
        active=active,
        calibration=tuple(calibration),
        dtype=dtype,
        device=device,
        restart=restart,
        text_field=text_field,
    )
    try:
        figures = run(options, RichProgress()).figures
    except KeyboardInterrupt:
        typer.echo(f"pregate: {interrupted(out)}", err=True)
        raise typer.Exit(130) from None
    report(out, figures)


def decouple(
    model: ModelOption,
    out: OutOption,
    text: Annotated[
        list[Path], typer.Option(help="Text to train on: .txt, .jsonl or folders of them.", show_default=False)
    ],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    dim: Annotated[int, typer.Option(help="Width of the path router.")] = 128,
    blocks: Annotated[int, typer.Option(help="Blocks of the path router.")] = 1,
    window: router.Window = 64,
    heads: router.Heads = "independent",
    embedding: router.Embedding = "own",
    target: router.Target = None,
    gate: router.Gate = "scores",
    weights: router.Weights = "one",
    predict: router.Predict = False,
    pool_tokens: Annotated[int, typer.Option(help="Tokens of text to learn from, at most.")] = 200_000,
    seed: SeedOption = 0,
    text_field: TextFieldOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an interrupted run left.")] = False,
) -> None:
    """Train a path router for a layer-wise checkpoint: exact paths, or a forecast. Interrupted, it can go on."""
    from pregate.convert.paths.decouple import DecoupleOptions
    from pregate.convert.paths.decouple import decouple as run
    from pregate.convert.progress import RichProgress
    from pregate.model.quiet import quiet_transformers

    quiet_transformers()
    options = DecoupleOptions(
        model,
        out,
        tuple(text),
        steps=steps,
        dim=dim,
        blocks=blocks,
        window=window,
        heads=heads,
        embedding=embedding,
        target=target,
        gate=gate,
        weights=weights,
        predict=predict,
        pool_tokens=pool_tokens,
        seed=seed,
        text_field=text_field,
        restart=restart,
    )
    try:
        figures = run(options, RichProgress()).figures["decouple"]  # the others were measured on another text
    except KeyboardInterrupt:
        typer.echo(f"pregate: {interrupted(out)}", err=True)
        raise typer.Exit(130) from None
    report(out, figures)


def evaluate(
    model: ModelOption,
    text: Annotated[
        list[Path], typer.Option(help="Text to score: .txt, .jsonl or folders of them.", show_default=False)
    ],
    max_tokens: Annotated[int | None, typer.Option(help="Score at most so many tokens.", show_default=False)] = None,
    controls: Annotated[bool, typer.Option("--controls", help="Score the model by other routings as well.")] = False,
    parent: Annotated[
        Path | None,
        typer.Option(help="The dense parent; without, the one the manifest names if it is there.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of random routing and of what --max-tokens leaves out.", show_default=False)
    ] = None,
    text_field: TextFieldOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity and bits per byte; for a routed model also how its routers agree, and --controls."""
    from pregate.convert.measure.evaluate import EvaluateOptions
    from pregate.convert.measure.evaluate import evaluate as run
    from pregate.convert.progress import RichProgress
    from pregate.model.quiet import quiet_transformers

    quiet_transformers()
    result = run(EvaluateOptions(model, tuple(text), max_tokens, controls, parent, seed, text_field), RichProgress())
    if as_json:
        typer.echo(strict_json(result))
        return
    rows = result.pop("controls", None)
    _print_figures(result)
    if rows:
        _print_controls(rows)


def _print_controls(rows: dict[str, dict[str, float]]) -> None:
    """One line per control: perplexity, its ratio to dense, bits per byte, active share, agreement with the oracle."""
    columns = ("perplexity", "ratio_to_dense", "bits_per_byte", "active_share", "same_set", "mean_overlap")
    typer.echo(f"\n{'':<24}" + "".join(f"{name:>16}" for name in columns))
    for name, row in rows.items():
        typer.echo(f"{name:<24}" + "".join(f"{row[c]:>16.4f}" if c in row else " " * 16 for c in columns))
    typer.echo("same_set: how often a token gets the oracle's experts in a layer; mean_overlap: the share in common")


def _shared(value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal():
        raise UserError.of("--shared", value, "allowed: auto, or a number from 0")
    return int(value)


def interrupted(out: Path) -> str:
    """What an interrupted run leaves, and how to go on."""
    from pregate.convert.files.partial import interrupted as sentence

    return sentence(out)


def report(out: Path, figures: dict[str, Any]) -> None:
    """Print what was measured of what was written to `out`."""
    _print_figures(figures)
    typer.echo(f"written: {out}")


def _print_figures(figures: dict[str, Any], indent: str = "") -> None:
    for name, value in figures.items():
        if isinstance(value, dict):
            typer.echo(f"{indent}{name}")
            _print_figures(value, indent + "  ")
        else:
            typer.echo(f"{indent}{name:<28} {value}")
