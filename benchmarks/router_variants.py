"""The rows of `benchmarks.router_ablation`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

REFERENCES = ("linear gate per layer", "oracle")


@dataclass(frozen=True, eq=False)
class Variant:
    """One row of the table: what of `DecoupleOptions` is not the default, and how many seeds it gets."""

    group: str
    name: str
    change: dict[str, Any] = field(default_factory=dict)
    num_seeds: int = 1

    @property
    def label(self) -> str:
        return f"{self.group}: {self.name}"


DEFAULT = Variant("default", "independent heads, dim 128, 1 block, window 64", num_seeds=3)
PAPER = Variant("target", "the paper's losses", {"target": "paper"})
RELATIVE = Variant("target", "each token and layer alike", {"target": "relative"}, 3)
SETS = Variant("target", "the oracle's sets", {"target": "sets"}, 3)
GATES = (
    Variant("gate", "captured mass, sigmoid or softmax, straight-through", {"target": "captured"}, 3),
    Variant("gate", "captured mass, DSelect-k", {"gate": "dselect"}, 3),
)
STORIES = (
    DEFAULT,
    Variant("shape", "recurrent over the layers", {"heads": "recurrent"}),
    Variant("shape", "one index for all layers", {"heads": "single"}),
    Variant("size", "dim 32", {"dim": 32}),
    Variant("size", "dim 256", {"dim": 256}),
    Variant("size", "2 blocks", {"blocks": 2}),
    Variant("window", "1 token", {"window": 1}),
    Variant("window", "8 tokens", {"window": 8}),
    Variant("window", "256 tokens", {"window": 256}),
    Variant("embedding", "the parent's, projected", {"embedding": "parent"}),
    RELATIVE,
    SETS,
    PAPER,
    *GATES,
)
#: What is compared with a fixed number of experts.
FIXED = (DEFAULT, RELATIVE, SETS, PAPER, *GATES)
#: What is compared on SmolLM2: what may close the gap first. A row is about half an hour of a core.
REAL = (
    Variant("default", "by the model's size: two blocks, window 112, the parent's embedding", num_seeds=3),
    SETS,
    RELATIVE,
    Variant("gate", GATES[0].name, GATES[0].change),
    Variant("text", "half as much", {"pool_tokens": 200_000}),
    Variant("size", "dim 128", {"dim": 128}),
    Variant("size", "1 block", {"blocks": 1}),
    Variant("window", "64 tokens", {"window": 64}),
    Variant("embedding", "its own, from the parent's", {"embedding": "own"}),
    Variant("shape", "recurrent over the layers", {"heads": "recurrent"}),
)


def variants_of(model: str, selection: str) -> tuple[Variant, ...]:
    """The rows of a model's table, in order."""
    return REAL if model == "SmolLM2" else STORIES if selection == "threshold" else FIXED
