"""What `pregate tune` is asked, checked once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pregate.base.errors import UserError, option_name

METHODS = ("full", "lora")
BALANCES = ("none", "bias", "loss")
PRECISIONS = ("auto", "float32", "bfloat16")
#: Tokens tuned on where no budget is given.
DEFAULT_TOKENS = 1_500_000
#: Weight of matching layers where there is a KL share and no weight is given (docs/measurements.md).
DEFAULT_MATCH = 20.0
#: Ten times CMoE's (docs/measurements.md).
DEFAULT_BALANCE_RATE = 1e-2


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """How a model in memory is tuned; what `Tuner` goes by.

    `method` lora: low-rank changes of `rank`, times `alpha` / `rank` (8 and 32 in CMoE, section 4.1). The FFNs are
    always tuned, and the scale by which a router or gate weighs its experts; the rest of it with `router`, everything
    else (attention, norms, embeddings, head) with `backbone`. The loss is (1 - `kl_share`) cross-entropy + `kl_share`
    KL(teacher || student), per token. To it come
    `hidden_match` times the squared error of every layer's output as the teacher's, relative to its square, and
    `router_mass` times the squared error of the router's scores as forecasts of the experts' present contribution
    masses, as a share of their variance; without `straight_through` a router learns from that alone. With `balance`
    "loss" comes `balance_loss` times Switch's auxiliary loss; with "bias" an expert's bias moves by `balance_rate`
    each step. Before the first step `refit` fits the down projections in closed form (`convert/tune/refit.py`), where
    the model is routed and not tuned yet.

    The run ends with the first of `steps`, `tokens` and `minutes`, or after `patience` evaluations (0: never) without
    a better one. A step takes `accumulate` batches of at most `batch_tokens`, padding included. Learning rates fall
    by a cosine after `warmup_steps`.
    """

    method: str = "full"
    rank: int = 8
    alpha: float = 32.0
    router: bool = True
    backbone: bool = True
    kl_share: float = 0.9
    hidden_match: float | None = None
    learning_rate: float | None = None
    router_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    router_mass: float = 1.0
    straight_through: bool = True
    refit: bool = True
    balance: str = "none"
    balance_rate: float = DEFAULT_BALANCE_RATE
    balance_loss: float = 1e-2
    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    warmup_steps: int = 20
    batch_tokens: int = 2048
    accumulate: int = 1
    eval_every: int = 200
    patience: int = 0
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self) -> None:
        choices = {"method": METHODS, "balance": BALANCES, "precision": PRECISIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError.of(option_name(name), getattr(self, name), f"allowed: {', '.join(allowed)}")
        least: dict[str, float] = {
            "rank": 1,
            "warmup_steps": 0,
            "batch_tokens": 2,
            "accumulate": 1,
            "eval_every": 1,
            "steps": 1,
            "tokens": 1,
            "patience": 0,
            "seed": 0,
            "weight_decay": 0,
            "router_mass": 0,
            "hidden_match": 0,
            "balance_loss": 0,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value < math.inf:
                raise UserError.of(option_name(name), value, f"allowed: {lowest} or more")
        for name in ("alpha", "learning_rate", "router_learning_rate", "balance_rate", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError.of(option_name(name), value, "allowed: above 0")
        if not 0 <= self.kl_share <= 1:
            raise UserError.of("--kl-share", self.kl_share, "allowed: 0 to 1")

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

    def rate_factor(self, step: int, share_done: float) -> float:
        """What the learning rates of step `step` (from 0) are multiplied by."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, share_done)))


@dataclass(frozen=True, kw_only=True)
class TuneOptions(TuningSettings):
    """How and on what a model folder (dense, or routed by gates or by paths) is tuned, and where the result goes.

    `teacher`: a dense model folder; None with KL: the dense parent, which a routed checkpoint is with every expert
    on until it is tuned (for a dense model: itself as it is now). Documents of `text` longer than `sequence_length`
    become several rows. `validation_share` of them is kept to measure on, unless `validation` gives other text for
    that. Every `checkpoint_every` steps, and after every five minutes, what an interrupted run needs to go on is
    written beside `out`; `restart` discards it. `device`: auto, cpu, cuda, cuda:N.
    """

    model: Path
    out: Path
    text: tuple[Path, ...]
    teacher: Path | None = None
    sequence_length: int = 512
    validation_share: float = 0.05
    validation: tuple[Path, ...] = ()
    checkpoint_every: int = 100
    device: str = "auto"
    restart: bool = False
    text_field: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.text:
            raise UserError("--text: give at least one .txt or .jsonl file, or a folder of them")
        for name, lowest in {"sequence_length": 2, "checkpoint_every": 1}.items():
            if getattr(self, name) < lowest:
                raise UserError.of(option_name(name), getattr(self, name), f"allowed: {lowest} or more")
        if not 0 < self.validation_share < 1:
            raise UserError.of("--validation-share", self.validation_share, "allowed: between 0 and 1")
        if self.teacher is not None and not self.wants_teacher:
            raise UserError.of("--teacher", self.teacher, "has no use with --kl-share 0 and --hidden-match 0")

    def describe(self) -> dict[str, Any]:
        """What the manifest says: every option, as it counted."""
        fields = asdict(self) | {"model": str(self.model), "out": str(self.out), "text": [str(p) for p in self.text]}
        fields["validation"] = [str(p) for p in self.validation]
        del fields["restart"]  # says nothing about the result
        fields |= {
            "hidden_match": self.matching,
            "learning_rate": self.model_learning_rate,
            "tokens": self.token_budget,
        }
        return fields | {"teacher": None if self.teacher is None else str(self.teacher)}
