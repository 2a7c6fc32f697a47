"""What a checkpoint's manifest says of its tuning, as far as a report shows it."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from pregate.model.checkpoint import Manifest

Part = TypeVar("Part")


@dataclass(frozen=True)
class Asked:
    """Options of `pregate tune`, as they counted (`tuning_options.TuneOptions`)."""

    text: list[str]
    validation: list[str]
    seed: int
    sequence_length: int
    eval_every: int
    method: str
    rank: int
    backbone: bool
    router: bool
    learning_rate: float
    router_learning_rate: float
    kl_share: float
    hidden_match: float
    router_mass: float
    balance: str
    balance_loss: float
    teacher: str | None


@dataclass(frozen=True)
class TunedOn:
    """How much text there was to train on, and kept back (`tuning_data.TuningRows`)."""

    num_tokens: int
    num_validation_rows: int
    num_validation_tokens: int


@dataclass(frozen=True)
class Outcome:
    """What it came to (`tuning_figures.tuned_figures`); `refit` is there if it began with a fit in closed form."""

    steps: int
    tokens: int
    best_step: int
    precision: str
    device: str
    refit: dict[str, Any] | None = None


@dataclass(frozen=True)
class Tuning:
    """What was asked, on what, and what came of it."""

    asked: Asked
    text: TunedOn
    outcome: Outcome


def tuning_of(manifest: Manifest) -> Tuning | None:
    """The tuning `manifest` tells of; None where it tells of none, or not all of it."""
    asked = _part(Asked, manifest.options)
    text = _part(TunedOn, manifest.calibration)
    outcome = _part(Outcome, manifest.figures)
    return None if asked is None or text is None or outcome is None else Tuning(asked, text, outcome)


def _part(kind: type[Part], section: dict[str, Any]) -> Part | None:
    said = section.get("tune", {})
    wanted = fields(kind)  # pyright: ignore[reportArgumentType]
    if any(field.name not in said and field.default is MISSING for field in wanted):
        return None
    return kind(**{field.name: said[field.name] for field in wanted if field.name in said})
