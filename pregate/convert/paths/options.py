"""What `pregate decouple` is asked: the path router's shape, or the layer to read; how it is trained, on what text, and
what it is for."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pregate.base.choices import Heads, RouterGate, RouterTarget, RouterWeights
from pregate.base.errors import UserError, option_name
from pregate.base.options import Device, Needs, Out, Restart, Seed, TextField, Texts, Word, described, options

if TYPE_CHECKING:
    from pregate.model.config import PathRouterConfig, ReadNetworkConfig

#: Not for a read network, which has one shape, no state and no forecast.
_OF_PATH_ROUTERS = ("blocks", "window", "heads", "gate", "weights", "embedding", "predict")
BY_SIZE = Word("by the model's size", written=False)


@options()
class DecoupleOptions:
    """How to train a path router, its shape (`PathRouterConfig`), and the text to learn on.

    `target` None: "mass", or with the gate "dselect" "captured". Others that are None follow the model's size
    (`size.py`).
    """

    model: Annotated[Path, Field(description="Layer-wise checkpoint folder."), Needs("layerwise")]
    out: Out
    text: Annotated[Texts, "Text to train on"]
    steps: Annotated[int | None, Field(ge=1), "Training steps.", BY_SIZE] = None
    dim: Annotated[int | None, Field(ge=4, multiple_of=4), "Width of the path router.", BY_SIZE] = None
    blocks: Annotated[int | None, Field(ge=1), "Blocks of the path router.", BY_SIZE] = None
    seed: Seed = 0
    pool_tokens: Annotated[int | None, Field(ge=2), "Tokens of text to learn on, at most.", BY_SIZE] = None
    sequence_length: Annotated[int, Field(ge=2), "Tokens of a document, at most."] = 512
    window: Annotated[int | None, Field(ge=1), "Tokens the path router looks at, this one included.", BY_SIZE] = None
    heads: Annotated[Heads, "One per layer, a cell that runs over the layers, or one index for all."] = "independent"
    gate: Annotated[RouterGate, "scores, or DSelect-k's binary codes, trained on captured."] = "scores"
    weights: Annotated[RouterWeights, "one, or learned: a weight for each expert, 1 until it is tuned."] = "one"
    target: Annotated[
        RouterTarget | None,
        "mass (regression), relative (each token and layer alike), sets (the oracle's), paper or captured.",
        Word("mass", written=False),
    ] = None
    embedding: Annotated[
        Literal["own", "parent"] | None, "own, or parent: the parent's times a learned projection.", BY_SIZE
    ] = None
    hold_share: Annotated[bool, "Thresholds follow a text, so that the active share is the one asked for."] = True
    read_layers: Annotated[
        int | None,
        Field(ge=1),
        "Paths known after so many layers: those keep their gates, then one network names all later experts.",
        Word("paths known before the model runs", written=False),
    ] = None
    predict: Annotated[bool, "Keep the gates; the path router forecasts them."] = False
    device: Device = "auto"
    text_field: TextField = None
    restart: Restart = False

    def __post_init__(self) -> None:
        if self.gate == "dselect" and self.objective != "captured":
            raise UserError.of("--target", self.target, "allowed with --gate dselect: captured")
        if self.predict and self.weights != "one":
            raise UserError.of("--weights", self.weights, "allowed with --predict: one; there the gates weigh experts")
        if self.read_layers is not None:
            self._check_read()

    def _check_read(self) -> None:
        """UserError for an option that says something of path routers alone."""
        defaults = {f.name: f.default for f in fields(self)}
        for name in _OF_PATH_ROUTERS:
            if (value := getattr(self, name)) != defaults[name]:
                reason = "not with --read-layers: it says how path routers are, and a read network is none"
                raise UserError.of(option_name(name), value, reason)

    @property
    def objective(self) -> RouterTarget:
        """The target, given or by default."""
        return self.target or ("captured" if self.gate == "dselect" else "mass")

    @property
    def kind(self) -> Literal["path", "read"]:
        """What is trained, a path router or a read network, as figures are named after it."""
        return "path" if self.read_layers is None else "read"

    def shape(self) -> PathRouterConfig:
        """Shape of the router, of options that are `sized`."""
        from pregate.model.config import PathRouterConfig

        assert self.dim is not None
        assert self.blocks is not None
        assert self.window is not None
        return PathRouterConfig(
            dim=self.dim,
            num_blocks=self.blocks,
            window=self.window,
            heads=self.heads,
            gate=self.gate,
            weights=self.weights,
            hold_share=self.hold_share,
        )

    def read_shape(self) -> ReadNetworkConfig:
        """Shape of the read network, of options that are `sized`."""
        from pregate.model.config import ReadNetworkConfig

        assert self.read_layers is not None
        assert self.dim is not None
        return ReadNetworkConfig(layer=self.read_layers, dim=self.dim)

    def describe(self) -> dict[str, Any]:
        """What the manifest says: every option, as it counted."""
        fixed = {} if self.read_layers is None else {"hold_share": False}
        return described(self, target=self.objective, **fixed)
