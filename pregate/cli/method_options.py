"""The options of `pregate convert` that say how to cut; without one the recipe's value counts."""

from __future__ import annotations

from typing import Annotated

import typer

from pregate.convert.cut.recipes import RECIPES

Clustering = Annotated[
    str | None, typer.Option(help="capture or marks (CMoE): how neurons are grouped.", show_default=False)
]
SharedBy = Annotated[
    str | None, typer.Option(help="capture, contribution or rate: how shared neurons are chosen.", show_default=False)
]
Gate = Annotated[
    str | None,
    typer.Option(help="linear, representative (CMoE's code) or representative-signed (its text).", show_default=False),
]
Selection = Annotated[
    str | None, typer.Option(help="threshold (a varying number per token) or top_k.", show_default=False)
]
TokenPower = Annotated[
    float | None, typer.Option(help="0 to 1: how much less a token of large activations counts.", show_default=False)
]
Intercept = Annotated[bool | None, typer.Option(help="Give the linear gate a bias.", show_default=False)]
Profile = Annotated[
    str | None, typer.Option(help="cosine or raw: activations that mark a neuron (CMoE).", show_default=False)
]
MarksPerToken = Annotated[int | None, typer.Option(help="Neurons a token marks, K_a (CMoE).", show_default=False)]
Distance = Annotated[
    str | None, typer.Option(help="l1 or l2, between marks and a centroid (CMoE).", show_default=False)
]
MaxIterations = Annotated[int | None, typer.Option(help="Assignments of --clustering marks.", show_default=False)]
Draw = Annotated[str | None, typer.Option(help="documents or stream: where windows start.", show_default=False)]
Samples = Annotated[int | None, typer.Option(help="Calibration windows.", show_default=False)]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens of a window.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Seed of every random choice.", show_default=False)]


def describe_recipes() -> str:
    """Every recipe's values, a paragraph each: all of capture's, of the others what differs."""
    default = vars(RECIPES["capture"])
    parts = []
    for name, recipe in RECIPES.items():
        values = {k: v for k, v in vars(recipe).items() if name == "capture" or v != default[k]}
        parts.append(f"Recipe {name}: " + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in values.items()) + ".")
    return "\n\n".join(parts)
