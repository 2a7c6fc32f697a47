"""What the tests of tuning share: options for tiny models, and checkpoints by CMoE's gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.tune.options import TuneOptions


def tiny_options(model: Path, text: Path, out: Path, **changes: Any) -> TuneOptions:
    """Twelve quick steps of 256 tokens with rates that move a tiny model, from where it is (no refit)."""
    fields: dict[str, Any] = {"steps": 12, "batch_tokens": 256, "eval_every": 6, "warmup_steps": 2, "device": "cpu"}
    fields |= {"learning_rate": 3e-3, "router_learning_rate": 3e-3, "sequence_length": 64, "validation_share": 0.2}
    fields |= {"refit": False, "kl_share": 0.5, "hidden_match": 0.0, "router_mass": 0.1}
    return TuneOptions(model=model, out=out, text=(text,), **(fields | changes))


def paper_checkpoint(dense: Path, text: Path, out: Path) -> Path:
    """The tiny model S2A2E8 with CMoE's representative gates."""
    method: dict[str, Any] = {"gate": "representative", "selection": "top_k"}
    convert(ConvertOptions(dense, out, 8, 2, 2, (text,), samples=4, sequence_length=64, **method))
    return out
