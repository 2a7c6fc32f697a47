"""The options of `pregate decouple` that say what the path router is and how it learns."""

from __future__ import annotations

from typing import Annotated

import typer

Window = Annotated[int, typer.Option(help="Tokens the path router looks at, this one included.")]
Heads = Annotated[
    str, typer.Option(help="independent (one per layer), recurrent (a cell over the layers) or single (one index).")
]
Embedding = Annotated[str, typer.Option(help="own, or parent: the parent's times a learned projection.")]
Target = Annotated[
    str | None,
    typer.Option(help="mass (regression), paper (Read-ME's loss) or captured (what is chosen).", show_default="mass"),
]
Gate = Annotated[str, typer.Option(help="scores, or dselect: DSelect-k's binary codes, trained on captured.")]
Weights = Annotated[str, typer.Option(help="one, or learned: a weight for each expert, 1 until it is tuned.")]
Predict = Annotated[bool, typer.Option("--predict", help="Keep the gates; the path router forecasts them.")]
