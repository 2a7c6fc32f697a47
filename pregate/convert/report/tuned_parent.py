"""The dense parent tuned as the checkpoint was: whether a folder is that, by what the two manifests tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pregate.base.errors import UserError
from pregate.model.checkpoint import MANIFEST, Manifest, read_manifest

OPTION = "--tuned-parent"
#: Budgets in minutes or rounds of the text end at slightly other numbers of tokens; more apart is another training.
MAX_TOKENS_APART = 0.05


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
        raise UserError.of(OPTION, path, reason)
    if not (path / MANIFEST).exists():
        if path.resolve() == Path(str(manifest.source.get("path", ""))).resolve():
            raise UserError.of(OPTION, path, "is the dense parent itself, which was not tuned")
        return TunedParent(str(path), recorded=False)
    theirs = read_manifest(path)
    if not theirs.is_tuned:
        raise UserError.of(OPTION, path, f"was not tuned: its manifest says {theirs.method!r}")
    ours_from, theirs_from = (m.source.get("sha256", {}) for m in (manifest, theirs))
    if any(theirs_from[name] != digest for name, digest in ours_from.items() if name in theirs_from):
        raise UserError.of(OPTION, path, f"was tuned from another dense model than --model {model} was cut from")
    records = [_record(m) for m in (manifest, theirs)]
    if not all(records):
        return TunedParent(str(path), recorded=False)
    return TunedParent(str(path), True, _differences(*records))


def _record(manifest: Manifest) -> dict[str, Any]:
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


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, ...]:
    names = [name for name in ours if name != "tokens" and ours[name] != theirs[name]]
    if abs(theirs["tokens"] - ours["tokens"]) > MAX_TOKENS_APART * ours["tokens"]:
        names.append(f"tokens seen: {theirs['tokens']:,} against {ours['tokens']:,}")
    return tuple(names)
