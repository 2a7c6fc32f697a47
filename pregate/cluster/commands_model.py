"""`pregate convert`, `decouple`, `evaluate`: from a dense model to a routed checkpoint, and what that cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ModelOption = Annotated[Path, typer.Option("--model", help="Model folder.", show_default=False)]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.", show_default=False)]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]


def convert(
    model: ModelOption,
    out: OutOption,
    experts: Annotated[int, typer.Option(help="Experts per layer, shared ones included.", show_default=False)],
    shared: Annotated[int, typer.Option(help="Experts that are always on.", show_default=False)],
    active: Annotated[int, typer.Option(help="Routed experts chosen per token.", show_default=False)],
    calibration: Annotated[
        list[Path], typer.Option(help="Text to profile on: .txt, .jsonl or folders of them.", show_default=False)
    ],
    gate: Annotated[str, typer.Option(help="linear or representative.")] = "linear",
    shared_by: Annotated[str, typer.Option(help="contribution or rate.")] = "contribution",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    seed: SeedOption = 0,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16, as stored.")] = "float32",
    device: Annotated[str, typer.Option(help="auto (a GPU when there is one), cpu, cuda or cuda:N.")] = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an interrupted run left.")] = False,
) -> None:
    """Cut a dense model's FFNs into shared and routed experts (CMoE, no training). Interrupted, it can go on."""
    from pregate.convert.conversion import convert as run
    from pregate.convert.options import ConvertOptions
    from pregate.convert.progress import RichProgress
    from pregate.model.quiet import quiet_transformers

    quiet_transformers()
    options = ConvertOptions(
        model=model,
        out=out,
        experts=experts,
        shared=shared,
        active=active,
        calibration=tuple(calibration),
        gate=gate,
        shared_by=shared_by,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        dtype=dtype,
        device=device,
        restart=restart,
    )
    try:
        figures = run(options, RichProgress()).figures
    except KeyboardInterrupt:
        typer.echo(f"pregate: {_interrupted(out)}", err=True)
        raise typer.Exit(130) from None
    _report(out, figures)


def decouple(
    model: ModelOption,
    out: OutOption,
    text: Annotated[
        list[Path], typer.Option(help="Text to train on: .txt, .jsonl or folders of them.", show_default=False)
    ],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    dim: Annotated[int, typer.Option(help="Width of the path router.")] = 128,
    blocks: Annotated[int, typer.Option(help="Blocks of the path router.")] = 1,
    seed: SeedOption = 0,
) -> None:
    """Train a path router for a layer-wise checkpoint and write one whose paths are exact."""
    from pregate.convert.decouple import DecoupleOptions
    from pregate.convert.decouple import decouple as run
    from pregate.convert.progress import RichProgress
    from pregate.model.quiet import quiet_transformers

    quiet_transformers()
    options = DecoupleOptions(model, out, tuple(text), steps=steps, dim=dim, blocks=blocks, seed=seed)
    _report(out, run(options, RichProgress()).figures["decouple"])  # the others were measured on another text


def evaluate(
    model: ModelOption,
    text: Annotated[Path, typer.Option(help="Text to score: .txt or .jsonl.", show_default=False)],
    max_tokens: Annotated[int | None, typer.Option(help="Score at most so many tokens.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity and bits per byte; for a routed model also how its routers agree."""
    from pregate.convert.evaluate import EvaluateOptions
    from pregate.convert.evaluate import evaluate as run
    from pregate.convert.progress import RichProgress
    from pregate.model.quiet import quiet_transformers

    quiet_transformers()
    result = run(EvaluateOptions(model, text, max_tokens), RichProgress())
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _print_figures(result)


def _interrupted(out: Path) -> str:
    """What an interrupted conversion leaves, and how to go on."""
    from pregate.convert.partial import read_state

    state = read_state(out)
    if state is None:
        return "interrupted; nothing was kept"
    done = f"interrupted after layer {state.layers_done} of {state.num_layers}"
    return f"{done}; the same command goes on there, with --restart it begins anew"


def _report(out: Path, figures: dict[str, Any]) -> None:
    _print_figures(figures)
    typer.echo(f"written: {out}")


def _print_figures(figures: dict[str, Any], indent: str = "") -> None:
    for name, value in figures.items():
        if isinstance(value, dict):
            typer.echo(f"{indent}{name}")
            _print_figures(value, indent + "  ")
        else:
            typer.echo(f"{indent}{name:<28} {value}")
