"""What `pregate tune` is asked, checked once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pregate.base.errors import UserError
from pregate.base.options import Device, Model, Needs, Out, Restart, Seed, TextField, Texts, Word, described, options

#: Tokens tuned on where no budget is given.
DEFAULT_TOKENS = 1_500_000
#: Weight of matching layers where there is a KL share and no weight is given.
DEFAULT_MATCH = 20.0

Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


@options(kw_only=True)
class TuningSettings:
    """How a model in memory is tuned; what `Tuner` goes by.

    `method` lora: low-rank changes (8 and 32 in CMoE, section 4.1). The scale by which a router or gate weighs its
    experts is always tuned. Without `ffn` and `backbone` the router or the gates learn alone, from what their choice
    does to the model's output, and every weight stays the parent's. The loss is (1 - `kl_share`) cross-entropy +
    `kl_share` KL(teacher || student), per token. To it come `hidden_match` times the squared error of every layer's
    output as the teacher's, relative to its square; `router_mass` times that of the router's scores as forecasts of the
    experts' present contribution masses, as a share of their variance (without `straight_through` a router learns from
    that alone); with `balance` "loss" Switch's auxiliary loss. Before the first step `refit` fits the down projections
    in closed form (`convert/tune/refit.py`), where the model is routed, its FFNs are tuned and were not yet.

    The run ends with the first of `steps`, `tokens` and `minutes`, or of `patience`. Learning rates fall by a cosine.
    """

    method: Annotated[Literal["full", "lora"], "What is trained."] = "full"
    rank: Annotated[int, Field(ge=1), "Rank of LoRA's changes."] = 8
    alpha: Annotated[float, Field(gt=0), "LoRA's changes count alpha / rank."] = 32.0
    router: Annotated[bool, "Tune the path router, or the layers' gates; a scale of experts' weights always is."] = True
    ffn: Annotated[bool, "Tune the FFNs; without them nothing is fitted first either."] = True
    backbone: Annotated[bool, "Tune attention, norms, embeddings and head."] = True
    kl_share: Annotated[Share, "Share of the KL to the teacher in the loss, 0 to 1."] = 0.9
    hidden_match: Annotated[
        float | None,
        Field(ge=0),
        "Weight of every layer's output being the teacher's; 20 with KL.",
        Word("20, or 0 without KL", written=False),
    ] = None
    learning_rate: Annotated[
        float | None, Field(gt=0), "Of the model.", Word("2e-4; 1e-3 with LoRA", written=False)
    ] = None
    router_learning_rate: Annotated[Rate, "Of the router or gates, and of the scale u."] = 1e-3
    weight_decay: Annotated[Weight, "AdamW's."] = 0.01
    router_mass: Annotated[Weight, "Weight of the router's error as a forecast of masses."] = 1.0
    straight_through: Annotated[bool, "Let the router learn from the losses as well, as if its choice were soft."] = (
        True
    )
    refit: Annotated[bool, "First fit the down projections in closed form."] = True
    balance: Annotated[Literal["none", "bias", "loss"], "Even use of experts, as CMoE (bias) or Switch (loss)."] = (
        "none"
    )
    balance_rate: Annotated[Rate, "What --balance bias adds to a bias per step."] = 1e-2
    balance_loss: Annotated[Weight, "Weight of --balance loss."] = 1e-2
    steps: Annotated[int | None, Field(ge=1), "Most optimizer steps."] = None
    tokens: Annotated[
        int | None,
        Field(ge=1),
        "End with the step that reaches so many.",
        Word("1500000 where no budget is given", written=False),
    ] = None
    minutes: Annotated[float | None, Field(gt=0), "Most minutes of tuning."] = None
    warmup_steps: Annotated[int, Field(ge=0), "Steps in which the learning rate rises."] = 20
    batch_tokens: Annotated[int, Field(ge=2), "Tokens of a batch, padding included."] = 2048
    accumulate: Annotated[int, Field(ge=1), "Batches of a step."] = 1
    eval_every: Annotated[int, Field(ge=1), "Steps between evaluations."] = 200
    patience: Annotated[int, Field(ge=0), "Stop after so many evaluations without a better one; 0: never."] = 0
    seed: Seed = 0
    gradient_checkpointing: Annotated[bool, "Run layers again going back: less memory, more time."] = False
    precision: Annotated[Literal["auto", "float32", "bfloat16"], "Of products; auto: bfloat16 on a GPU."] = "auto"

    @property
    def model_learning_rate(self) -> float:
        """The rate of everything but the router: what was given, or where to start from."""
        return self.learning_rate or (2e-4 if self.method == "full" else 1e-3)

    @property
    def wants_teacher(self) -> bool:
        """Whether the loss asks for a teacher."""
        return self.kl_share > 0 or self.matching > 0

    @property
    def matching(self) -> float:
        """`hidden_match`, or what counts where none is given."""
        default = DEFAULT_MATCH if self.kl_share else 0.0
        return default if self.hidden_match is None else self.hidden_match

    @property
    def token_budget(self) -> int | None:
        """`tokens`, or the default where no budget is given at all."""
        unlimited = self.steps is None and self.minutes is None
        return DEFAULT_TOKENS if self.tokens is None and unlimited else self.tokens

    def share_done(self, steps: int, tokens: int, seconds: float) -> float:
        """How much of the budget is used, 0 to 1 and beyond."""
        shares = [steps / self.steps] if self.steps else []
        shares += [tokens / self.token_budget] if self.token_budget else []
        shares += [seconds / (60 * self.minutes)] if self.minutes else []
        return max(shares)

    @property
    def keeps_weights(self) -> bool:
        """Whether the model's own weights stay as they are, low-rank changes beside them aside."""
        return self.method == "lora" or not (self.ffn or self.backbone)

    @property
    def fits_first(self) -> bool:
        """Whether down projections are fitted before the first step."""
        return self.refit and self.ffn


@options(kw_only=True)
class TuneOptions(TuningSettings):
    """How and on what a model folder (dense, or routed by gates or by paths) is tuned, and where the result goes.

    `teacher` None with KL: the dense parent, which a routed checkpoint is with every expert on until it is tuned (for a
    dense model: itself as it is now). `validation_share` of the documents is kept to measure on, unless `validation`
    gives other text for that. Every `checkpoint_every` steps, and after every five minutes, what an interrupted run
    needs to go on is written beside `out`.
    """

    model: Model
    out: Out
    text: Annotated[Texts, "Text to tune on"]
    teacher: Annotated[
        Path | None, "Dense model to keep to.", Needs("model"), Word("the dense parent", written=False)
    ] = None
    sequence_length: Annotated[int, Field(ge=2), "Tokens of a row; longer documents become several."] = 512
    validation_share: Annotated[float, Field(gt=0, lt=1), "Share of the documents kept to measure on."] = 0.05
    validation: Annotated[tuple[Path, ...], Needs("text"), "Text to measure on instead"] = ()
    checkpoint_every: Annotated[int, Field(ge=1), "Steps after which an interrupted run can go on."] = 100
    device: Device = "auto"
    restart: Restart = False
    text_field: TextField = None

    def __post_init__(self) -> None:
        if self.teacher is not None and not self.wants_teacher:
            raise UserError.of("--teacher", self.teacher, "has no use with --kl-share 0 and --hidden-match 0")

    def describe(self) -> dict[str, Any]:
        """What the manifest says: every option that bears on the result, as it counted."""
        rate, budget = self.model_learning_rate, self.token_budget
        return described(self, hidden_match=self.matching, learning_rate=rate, tokens=budget)
