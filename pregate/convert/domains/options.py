"""What `pregate read-me` is asked, checked once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pregate.base.choices import RouterTarget
from pregate.base.errors import UserError
from pregate.base.options import Device, Dtype, Key, Model, Needs, Out, Restart, Seed, TextField, described, options

if TYPE_CHECKING:
    from pregate.model.config import PathRouterConfig

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


@options(kw_only=True)
class ReadMeOptions:
    """How a dense model becomes domain experts with one index for all layers (Read-ME, arXiv 2410.19123).

    Numbers have the paper's values. An expert holds `active_share` of every layer's channels: those of greatest `score`
    over `samples` windows, the mean |h| ("activation", Read-ME's), or that times the norm of the down column
    ("contribution"). `permanent`: see `domain_cut`.

    Training takes `rounds` rounds of two stages. The router's, all else frozen; its `target` is said at
    `domain_targets`, its `loss` in `paths/losses.py`. The experts', the router frozen, and everything else tuned by
    cross-entropy, `kl_share` of it replaced by the divergence from the parent. Learning rates fall by a cosine within a
    stage, and by `decay` from round to round.
    """

    model: Model
    out: Out
    domains: Annotated[
        tuple[Path, ...], Field(min_length=2), "Text of one domain each; 2 or more", Needs("text"), Key("domain")
    ]
    active_share: Annotated[Share, "Share of each FFN's channels in an expert."] = 0.5
    permanent: Annotated[
        Literal["fused", "separate"], "What all domains use: fused (in every expert) or separate (a shared expert)."
    ] = "fused"
    score: Annotated[
        Literal["activation", "contribution"], "Of a channel: activation (Read-ME), or that times the down column."
    ] = "activation"
    samples: Annotated[Count, "Windows of each domain that channels are scored on."] = 16
    sequence_length: Annotated[int, Field(ge=2), "Tokens of a window or document, at most."] = 4096
    rounds: Annotated[Count, "Rounds of router training and tuning."] = 8
    router_steps: Annotated[Count, "Steps of the router in a round."] = 100
    steps: Annotated[int, Field(ge=0), "Steps of the experts in a round; 0: none."] = 200
    router_batch: Annotated[Count, "Full sequences of a router's step."] = 64
    batch: Annotated[Count, "Full sequences of an experts' step."] = 128
    router_learning_rate: Annotated[float, Field(gt=0), "The router's, in the first round."] = 5e-4
    learning_rate: Annotated[float, Field(gt=0), "Everything else's, in the first round."] = 5e-5
    decay: Annotated[Share, "Of learning rates, from round to round."] = 0.8
    weight_decay: Annotated[float, Field(ge=0), "Of both optimizers."] = 0.01
    target: Annotated[
        Literal["overlap", "contribution"],
        "What the router learns: overlap (Read-ME) with strong channels, or contribution.",
    ] = "overlap"
    loss: Annotated[RouterTarget, "How it learns it; paper is Read-ME's."] = "paper"
    kl_share: Annotated[float, Field(ge=0, le=1), "Share of the loss that is divergence from the parent."] = 0.0
    tie_overlap: Annotated[bool, "A row that several experts hold stays one weight."] = True
    pool_tokens: Annotated[int, Field(ge=2), "Tokens of text to train on, at most."] = 2_000_000
    batch_tokens: Annotated[int, Field(ge=2), "Tokens of a step in memory at a time."] = 8192
    dim: Annotated[int, Field(ge=4, multiple_of=4), "Width of the path router."] = 512
    blocks: Annotated[Count, "Blocks of the path router."] = 1
    seed: Seed = 0
    dtype: Annotated[Dtype | Literal["auto"], "What weights are stored as; auto: as they were."] = "auto"
    device: Device = "auto"
    restart: Restart = False
    text_field: TextField = None

    def __post_init__(self) -> None:
        resolved = [path.resolve() for path in self.domains]
        for path in self.domains:
            if resolved.count(path.resolve()) > 1:
                raise UserError.of("--domain", path, "given twice; each domain is one expert")

    def router_shape(self) -> PathRouterConfig:
        from pregate.model.config import PathRouterConfig

        return PathRouterConfig(dim=self.dim, num_blocks=self.blocks, heads="single")

    def describe(self) -> dict[str, Any]:
        """What the manifest says: every option that bears on the result."""
        return described(self)
