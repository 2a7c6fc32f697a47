"""What `pregate decouple` is asked: the path router's shape, how it is trained, on what text, and what it is for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pregate.base.errors import UserError, option_name
from pregate.model.config import PathRouterConfig

TARGETS = ("mass", "paper", "captured")
EMBEDDINGS = ("own", "parent")


@dataclass(frozen=True)
class DecoupleOptions:
    """How to train a path router: shape (`dim`, `blocks`, `window`, `heads`, `gate`, `weights`: `PathRouterConfig`),
    `steps`, `target` and `embedding` (`TrainingOptions`), and the text to learn on.

    At most `pool_tokens` tokens of text are used, in documents of at most `sequence_length`. With `predict` the gates
    go on deciding and the router forecasts them. `target` None: "mass", or with the gate "dselect" "captured".
    `restart` discards what an interrupted run left beside `out`.
    """

    model: Path
    out: Path
    text: tuple[Path, ...]
    steps: int = 2000
    dim: int = 128
    blocks: int = 1
    seed: int = 0
    pool_tokens: int = 200_000
    sequence_length: int = 512
    window: int = 64
    heads: str = "independent"
    gate: str = "scores"
    weights: str = "one"
    target: str | None = None
    embedding: str = "own"
    predict: bool = False
    text_field: str | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "dim": 4, "blocks": 1, "seed": 0, "pool_tokens": 2}.items():
            if getattr(self, name) < least:
                raise UserError.of(option_name(name), getattr(self, name), f"allowed: {least} or more")
        if not self.text:
            raise UserError("--text: give at least one .txt or .jsonl file, or a folder of them")
        self.shape()
        if self.target not in (None, *TARGETS):
            raise UserError.of("--target", self.target, f"allowed: {', '.join(TARGETS)}")
        if self.embedding not in EMBEDDINGS:
            raise UserError.of("--embedding", self.embedding, f"allowed: {', '.join(EMBEDDINGS)}")
        if self.gate == "dselect" and self.objective != "captured":
            raise UserError.of("--target", self.target, "allowed with --gate dselect: captured")
        if self.predict and self.weights != "one":
            raise UserError.of("--weights", self.weights, "allowed with --predict: one; there the gates weigh experts")

    @property
    def objective(self) -> str:
        """The target, given or by default."""
        return self.target or ("captured" if self.gate == "dselect" else "mass")

    def shape(self) -> PathRouterConfig:
        """Shape of the router; UserError names the option that does not fit."""
        return PathRouterConfig(
            dim=self.dim,
            num_blocks=self.blocks,
            window=self.window,
            heads=self.heads,
            gate=self.gate,
            weights=self.weights,
        )

    def describe(self) -> dict[str, Any]:
        fields = asdict(self) | {"target": self.objective}
        del fields["restart"]  # says nothing about the result
        return fields | {"model": str(self.model), "out": str(self.out), "text": [str(p) for p in self.text]}
