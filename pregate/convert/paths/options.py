"""What `pregate decouple` is asked: the path router's shape, how it is trained, on what text, and what it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pregate.base.choices import Heads, RouterGate, RouterTarget, RouterWeights
from pregate.base.errors import UserError
from pregate.base.options import Model, Out, Restart, Seed, TextField, Texts, Word, options, to_dict

if TYPE_CHECKING:
    from pregate.model.config import PathRouterConfig


@options()
class DecoupleOptions:
    """How to train a path router: shape (`dim`, `blocks`, `window`, `heads`, `gate`, `weights`: `PathRouterConfig`),
    `steps`, `target` and `embedding` (`TrainingOptions`), and the text to learn on.

    At most `pool_tokens` tokens of text are used, in documents of at most `sequence_length`. With `predict` the gates
    go on deciding and the router forecasts them. `target` None: "mass", or with the gate "dselect" "captured".
    `restart` discards what an interrupted run left beside `out`.
    """

    model: Model
    out: Out
    text: Annotated[Texts, Field(description="Text to train on")]
    steps: Annotated[int, Field(ge=1, description="Training steps.")] = 2000
    dim: Annotated[int, Field(ge=4, multiple_of=4, description="Width of the path router.")] = 128
    blocks: Annotated[int, Field(ge=1, description="Blocks of the path router.")] = 1
    seed: Seed = 0
    pool_tokens: Annotated[int, Field(ge=2, description="Tokens of text to learn on, at most.")] = 200_000
    sequence_length: Annotated[int, Field(ge=2, description="Tokens of a document, at most.")] = 512
    window: Annotated[int, Field(ge=1, description="Tokens the path router looks at, this one included.")] = 64
    heads: Annotated[
        Heads,
        Field(description="One per layer, a cell that runs over the layers, or one index for all."),
    ] = "independent"
    gate: Annotated[RouterGate, Field(description="scores, or DSelect-k's binary codes, trained on captured.")] = (
        "scores"
    )
    weights: Annotated[
        RouterWeights, Field(description="one, or learned: a weight for each expert, 1 until it is tuned.")
    ] = "one"
    target: Annotated[
        RouterTarget | None,
        Field(description="mass (regression), paper (Read-ME's loss) or captured (what is chosen)."),
        Word("mass", written=False),
    ] = None
    embedding: Annotated[
        Literal["own", "parent"], Field(description="own, or parent: the parent's times a learned projection.")
    ] = "own"
    predict: Annotated[bool, Field(description="Keep the gates; the path router forecasts them.")] = False
    text_field: TextField = None
    restart: Restart = False

    def __post_init__(self) -> None:
        if self.gate == "dselect" and self.objective != "captured":
            raise UserError.of("--target", self.target, "allowed with --gate dselect: captured")
        if self.predict and self.weights != "one":
            raise UserError.of("--weights", self.weights, "allowed with --predict: one; there the gates weigh experts")

    @property
    def objective(self) -> RouterTarget:
        """The target, given or by default."""
        return self.target or ("captured" if self.gate == "dselect" else "mass")

    def shape(self) -> PathRouterConfig:
        """Shape of the router."""
        from pregate.model.config import PathRouterConfig

        return PathRouterConfig(
            dim=self.dim,
            num_blocks=self.blocks,
            window=self.window,
            heads=self.heads,
            gate=self.gate,
            weights=self.weights,
        )

    def describe(self) -> dict[str, Any]:
        """What the manifest says: every option, as it counted."""
        fields = to_dict(self) | {"target": self.objective}
        del fields["restart"]  # says nothing about the result
        return fields
