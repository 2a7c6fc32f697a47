"""README.md of an exported Qwen2-MoE folder: what it is, how it was made, what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pregate.convert.files.routed_shards import RoutedShards

_CARD = """\
# {title}

A dense {family} model cut into experts by pregate, written as a stock Qwen2-MoE model: it loads with plain
transformers (`AutoModelForCausalLM.from_pretrained`), and has the tensor names and config fields that vLLM and SGLang
read for `Qwen2MoeForCausalLM`. Nothing of pregate is needed.

Each layer has {shared} of {total} experts always on, as one shared expert, and {active} of the {routed} others per
token. Chosen experts have equal weight: gates are scaled so far down that the softmax over them is nearly flat
(by {gate_factors}), the routed down-projections are {active} times and the shared one is 2 times the parent's (the
shared expert's own gate is 0, which is a factor of 1/2). Layer by layer factors are in `export.json`.

Measured on: {measured_on}, by transformers on a CPU, against the routed model it was made from in float32:

| figure | value |
| --- | --- |
{rows}
"""


def write_card(folder: Path, source: RoutedShards, figures: dict[str, Any]) -> None:
    """Write the README.md of `folder`."""
    cut = source.config.cuts[0]
    measured = {k: v for k, v in figures.items() if k not in ("measured_on", "gate_factors") and v is not None}
    for name, value in measured.items():
        if isinstance(value, list):  # where greedy texts part
            parted = (f"prompt {p['prompt']} at token {p['token']}, margin {p['margin']}" for p in value)
            measured[name] = "; ".join(parted) or "none"
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in measured.items())
    text = _CARD.format(
        title=source.folder.name,
        family=source.config.text_config.model_type,
        shared=cut.num_shared,
        total=cut.num_shared + cut.num_routed,
        active=cut.num_active,
        routed=cut.num_routed,
        gate_factors=figures["gate_factors"],
        measured_on=figures["measured_on"],
        rows=rows,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
