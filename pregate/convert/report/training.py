"""The curves of a training, from `training.jsonl` in the checkpoint's folder, where `pregate tune` writes it.

One JSON object a line: "step", and any of "loss", "cross_entropy", "kl", "learning_rate", "validation_perplexity",
"active_share", each a number. Other fields are left alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pregate.base.errors import UserError
from pregate.convert.report.figures import TrainingCurve
from pregate.convert.tune.state import CURVE

CURVES = ("loss", "cross_entropy", "kl", "validation_perplexity", "active_share", "learning_rate")
#: A page shows no more points of one curve than this.
MAX_POINTS = 200


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
        step = _number(record.get("step"))
        for name in CURVES:
            value = _number(record.get(name))
            if step is not None and value is not None:
                points.setdefault(name, []).append((step, value))
    return tuple(_curve(name, points[name]) for name in CURVES if name in points)


def _record(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError.of("--model", where, f"not a JSON record ({error})") from error
    return record if isinstance(record, dict) else {}


def _number(value: Any) -> float | None:
    """A finite number as float; None for anything else."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def _curve(name: str, points: list[tuple[float, float]]) -> TrainingCurve:
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    steps, values = zip(*((sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups), strict=True)
    return TrainingCurve(name, steps, values)
