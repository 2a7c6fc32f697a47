"""What a checkpoint's folder tells of its training: the curves of `training.jsonl`, and what the manifest says.

`pregate tune` writes one JSON object a line: "step", and any of "loss", "cross_entropy", "kl", "learning_rate",
"validation_perplexity", "active_share", each a number. Other fields are left alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pregate.base.errors import UserError
from pregate.convert.tune.state import CURVE
from pregate.model.checkpoint import Manifest

CURVES = ("loss", "cross_entropy", "kl", "validation_perplexity", "active_share", "learning_rate")
#: A page shows no more points of one curve than this.
MAX_POINTS = 200
#: What a page says of a tuning: options as they counted, the text there was, and what came of it.
ASKED = (
    *("text", "validation", "seed", "sequence_length", "eval_every", "method", "rank", "backbone", "router"),
    *("learning_rate", "router_learning_rate", "kl_share", "hidden_match", "router_mass"),
    *("balance", "balance_loss", "teacher"),
)
TUNED_ON = ("num_tokens", "num_validation_rows", "num_validation_tokens")
OUTCOME = ("steps", "tokens", "best_step", "precision", "device")


@dataclass(frozen=True)
class TrainingCurve:
    """One quantity along a training: `steps` and `values` of equal length."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


def tuning_of(manifest: Manifest) -> dict[str, dict[str, Any]] | None:
    """What `manifest` tells of its last tuning: "asked", "text" and "outcome"; None where it lacks any of it.

    "refit" in "outcome" says whether it began with a fit in closed form.
    """
    asked, text, outcome = (part.get("tune", {}) for part in (manifest.options, manifest.calibration, manifest.figures))
    found = {"asked": (ASKED, asked), "text": (TUNED_ON, text), "outcome": (OUTCOME, outcome)}
    if any(name not in said for names, said in found.values() for name in names):
        return None
    told = {part: {name: said[name] for name in names} for part, (names, said) in found.items()}
    return told | {"outcome": told["outcome"] | {"refit": outcome.get("refit") is not None}}


def training_curves(folder: Path) -> tuple[TrainingCurve, ...]:
    """The curves of `folder`, none where it has no such file; UserError where the file is no JSON lines.

    Of long curves means over stretches of equal length are kept.
    """
    path = folder / CURVE
    if not path.is_file():
        return ()
    points: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        record = _record(line, f"{path}:{number}") if line.strip() else {}
        for name in CURVES:
            step, value = record.get("step"), record.get(name)
            if _is_number(step) and _is_number(value):
                points.setdefault(name, []).append((step, value))
    return tuple(_curve(name, points[name]) for name in CURVES if name in points)


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError.of("--model", where, f"not a JSON record ({error})") from error
    return record if isinstance(record, dict) else {}


def _curve(name: str, points: list[tuple[float, float]]) -> TrainingCurve:
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    steps, values = zip(*((sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups), strict=True)
    return TrainingCurve(name, steps, values)
