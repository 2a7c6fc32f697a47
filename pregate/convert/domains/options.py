"""What `pregate read-me` is asked, checked once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pregate.base.errors import UserError, option_name
from pregate.convert.cut.options import DTYPES
from pregate.convert.domains.channels import PERMANENTS, active_width
from pregate.convert.domains.targets import TARGETS
from pregate.convert.paths.options import TARGETS as LOSSES
from pregate.model.config import PathRouterConfig

SCORES = ("activation", "contribution")


@dataclass(frozen=True, kw_only=True)
class ReadMeOptions:
    """How a dense model becomes domain experts with one index for all layers (Read-ME, arXiv 2410.19123).

    Numbers have the paper's values. `domains`: one file or folder of text each, and one expert each, in their order.
    An expert holds `active_share` of every layer's channels: those of greatest `score` over `samples` windows of
    `sequence_length` tokens (cut to the model's context), the mean |h| ("activation", Read-ME's), or that times the
    norm of the down column ("contribution"). `permanent`: see `domain_cut`.

    Training takes `rounds` rounds of two stages. The router's: `router_steps` steps of `router_batch` documents, all
    else frozen; its `target` is said at `domain_targets`, its `loss` at `router_losses`. The experts': `steps` steps
    of `batch` documents, the router frozen, and everything else tuned by cross-entropy, `kl_share` of it replaced by
    the divergence from the parent. (0 steps: there is none.) Learning rates fall by a cosine within a stage, and by
    `decay` from round to round. `tie_overlap` keeps a row that several experts hold one weight. At most `pool_tokens`
    tokens are trained on. `batch_tokens` bounds what is in memory of a stage's step.

    The path router has `dim` and `blocks`. `dtype` is what is stored; `device`: auto, cpu, cuda or cuda:N. `restart`
    discards what an interrupted run left beside `out`.
    """

    model: Path
    out: Path
    domains: tuple[Path, ...]
    active_share: float = 0.5
    permanent: str = "fused"
    score: str = "activation"
    samples: int = 16
    sequence_length: int = 4096
    rounds: int = 8
    router_steps: int = 100
    steps: int = 200
    router_batch: int = 64
    batch: int = 128
    router_learning_rate: float = 5e-4
    learning_rate: float = 5e-5
    decay: float = 0.8
    weight_decay: float = 0.01
    target: str = "overlap"
    loss: str = "paper"
    kl_share: float = 0.0
    tie_overlap: bool = True
    pool_tokens: int = 2_000_000
    batch_tokens: int = 8192
    dim: int = 512
    blocks: int = 1
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    restart: bool = False
    text_field: str | None = None

    def __post_init__(self) -> None:
        choices = {"permanent": PERMANENTS, "score": SCORES, "target": TARGETS, "loss": LOSSES, "dtype": DTYPES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError.of(option_name(name), getattr(self, name), f"allowed: {', '.join(allowed)}")
        least: dict[str, float] = {"samples": 1, "sequence_length": 2, "rounds": 1, "router_steps": 1, "steps": 0}
        least |= {"router_batch": 1, "batch": 1, "pool_tokens": 2, "batch_tokens": 2, "dim": 4, "blocks": 1, "seed": 0}
        for name, lowest in (least | {"weight_decay": 0}).items():
            if not lowest <= getattr(self, name) < math.inf:
                raise UserError.of(option_name(name), getattr(self, name), f"allowed: {lowest} or more")
        for name in ("router_learning_rate", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError.of(option_name(name), getattr(self, name), "allowed: above 0")
        for name in ("active_share", "decay"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError.of(option_name(name), getattr(self, name), "allowed: above 0, at most 1")
        if not 0 <= self.kl_share <= 1:
            raise UserError.of("--kl-share", self.kl_share, "allowed: 0 to 1")
        self._check_domains()
        self.router_shape()

    def _check_domains(self) -> None:
        if len(self.domains) < 2:
            raise UserError(f"--domain: {len(self.domains)} given; allowed: 2 or more files or folders of text")
        resolved = [path.resolve() for path in self.domains]
        for path in self.domains:
            if resolved.count(path.resolve()) > 1:
                raise UserError.of("--domain", path, "given twice; each domain is one expert")

    def router_shape(self) -> PathRouterConfig:
        return PathRouterConfig(dim=self.dim, num_blocks=self.blocks, heads="single")

    def active_width(self, width: int) -> int:
        """Channels that a token runs of a layer of `width`."""
        return active_width(width, self.active_share)

    def round_factor(self, index: int) -> float:
        """What the learning rates of round `index` (from 0) are multiplied by."""
        return self.decay**index

    def describe(self) -> dict[str, Any]:
        """What the manifest says: every option that bears on the result."""
        fields = asdict(self) | {"model": str(self.model), "out": str(self.out)}
        del fields["restart"]
        return fields | {"domains": [str(path) for path in self.domains]}
