"""What a checkpoint's folder says of its training: the curves of `training.jsonl`, and what the manifest says; and
whether another folder is the dense parent tuned as the checkpoint was, by what the two manifests tell.

`pregate tune` writes one JSON object a line: "step", and any of "loss", "cross_entropy", "kl", "learning_rate",
"validation_perplexity", "active_share", each a number. Other fields are left alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pregate.base.errors import UserError
from pregate.base.strict_json import parse_json
from pregate.convert.tune.state import CURVE
from pregate.model.checkpoint import MANIFEST, Manifest, read_manifest

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
#: The option that names that folder.
TUNED_PARENT = "--tuned-parent"
#: Budgets in minutes or rounds of the text end at slightly other numbers of tokens; more apart is another training.
MAX_TOKENS_APART = 0.05
OUTCOME = ("steps", "tokens", "best_step", "precision", "device")


@dataclass(frozen=True)
class TrainingCurve:
    """One quantity along a training: `steps` and `values` of equal length."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


def tuning_of(manifest: Manifest) -> dict[str, dict[str, Any]] | None:
    """What `manifest` says of its last tuning: "asked", "text" and "outcome"; None where it lacks any of it.

    "refit" in "outcome" says whether it began with a fit in closed form.
    """
    asked, text, outcome = (part.get("tune", {}) for part in (manifest.options, manifest.calibration, manifest.figures))
    found = {"asked": (ASKED, asked), "text": (TUNED_ON, text), "outcome": (OUTCOME, outcome)}
    if any(name not in said for names, said in found.values() for name in names):
        return None
    parts = {part: {name: said[name] for name in names} for part, (names, said) in found.items()}
    fitted = outcome.get("refit", {"kept": False}).get("kept", True)  # older ones were kept, and do not say so
    return parts | {"outcome": parts["outcome"] | {"refit": fitted}}


def training_curves(folder: Path) -> tuple[TrainingCurve, ...]:
    """The curves of `folder`, none where it has no such file; UserError where the file is no JSON lines.

    Of long curves means over stretches of equal length are kept.
    """
    path = folder / CURVE
    if not path.is_file():
        return ()
    points: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = parse_json(line) if line.strip() else {}
        except ValueError as error:
            raise UserError.of("--model", f"{path}:{number}", f"not a JSON record ({error})") from error
        for name in CURVES if isinstance(record, dict) else ():
            step, value = record.get("step"), record.get(name)
            if _is_number(step) and _is_number(value):
                points.setdefault(name, []).append((step, value))
    curves = []
    for name in (name for name in CURVES if name in points):
        size = -(-len(points[name]) // MAX_POINTS)
        groups = [points[name][i : i + size] for i in range(0, len(points[name]), size)]
        steps, values = zip(
            *(([sum(axis) / len(group) for axis in zip(*group, strict=True)]) for group in groups), strict=True
        )
        curves.append(TrainingCurve(name, steps, values))
    return tuple(curves)


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)


@dataclass(frozen=True)
class TunedParent:
    """`recorded`: both manifests tell of the training; then `differences` says in what these differ (none: alike)."""

    path: str
    recorded: bool
    differences: tuple[str, ...] = ()


def tuned_parent(path: Path, model: Path, manifest: Manifest) -> TunedParent:
    """What `path` is to the checkpoint at `model`, which has `manifest`.

    UserError where it cannot be its dense parent tuned alike: --model was not tuned, or by the manifests `path` was
    not, or came from another dense model.
    """
    if not manifest.is_tuned:
        reason = f"--model {model} was not tuned, and is compared with its dense parent as it is"
        raise UserError.of(TUNED_PARENT, path, reason)
    if not (path / MANIFEST).exists():
        if path.resolve() == Path(str(manifest.source.get("path", ""))).resolve():
            raise UserError.of(TUNED_PARENT, path, "is the dense parent itself, which was not tuned")
        return TunedParent(str(path), recorded=False)
    theirs = read_manifest(path)
    if not theirs.is_tuned:
        raise UserError.of(TUNED_PARENT, path, f"was not tuned: its manifest says {theirs.method!r}")
    ours_from, theirs_from = (m.source.get("sha256", {}) for m in (manifest, theirs))
    if any(theirs_from[name] != digest for name, digest in ours_from.items() if name in theirs_from):
        raise UserError.of(TUNED_PARENT, path, f"was tuned from another dense model than --model {model} was cut from")
    records = [_training(m) for m in (manifest, theirs)]
    if not all(records):
        return TunedParent(str(path), recorded=False)
    ours, other = records
    names = [name for name in ours if name != "tokens" and ours[name] != other[name]]
    if abs(other["tokens"] - ours["tokens"]) > MAX_TOKENS_APART * ours["tokens"]:
        names.append(f"tokens seen: {other['tokens']:,} against {ours['tokens']:,}")
    return TunedParent(str(path), True, tuple(names))


def _training(manifest: Manifest) -> dict[str, Any]:
    """What makes two trainings alike; {} where the manifest does not tell it all."""
    asked, text, found = (part.get("tune", {}) for part in (manifest.options, manifest.calibration, manifest.figures))
    if not ({"text", "sequence_length", "seed"} <= asked.keys() and "tokens" in found and "files" in text):
        return {}
    return {
        "text": (sorted(text["files"]), text.get("num_tokens")),
        "sequence length": asked["sequence_length"],
        "times tuned": manifest.method.split("+").count("tune"),
        "tokens": found["tokens"],
    }
