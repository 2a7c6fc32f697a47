"""A tiny model cut by three domains: text, options and checkpoints for the tests of Read-ME."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pregate.convert.domains.options import ReadMeOptions
from pregate.model import RoutedForCausalLM
from pregate.model.layers import RoutedMLP

#: One manner of text a domain, so that the tokens differ.
DOMAINS = {
    "trade": "Seven loaves at four pence each make twenty-eight pence, and the oil costs 1,200 pounds. ",
    "verse": "O wind that walks upon the water, tell the hills what thou hast heard: a bell beneath the waves. ",
    "harbour": "The fishermen mended their nets on the wall, talking of prices and of the weather at noon. ",
}


def write_domains(folder: Path) -> tuple[Path, ...]:
    """One file a domain, of paragraphs that are documents."""
    paths = []
    for name, sentence in DOMAINS.items():
        words = sentence.split()
        turned = [" ".join(words[n % len(words) :] + words[: n % len(words)]) for n in range(40)]
        path = folder / f"{name}.txt"
        path.write_text("\n\n".join(turned), encoding="utf-8")
        paths.append(path)
    return tuple(paths)


def small(model: Path, out: Path, domains: tuple[Path, ...], **given: Any) -> ReadMeOptions:
    """Options of a run of a second: one round, half of every FFN, windows of 32 tokens."""
    fields: dict[str, Any] = {"samples": 4, "sequence_length": 32, "rounds": 1, "router_steps": 8, "steps": 2}
    fields |= {"router_batch": 4, "batch": 4, "batch_tokens": 64, "dim": 16, "pool_tokens": 1500}
    return ReadMeOptions(model=model, out=out, domains=domains, **(fields | given))


def load(path: Path) -> RoutedForCausalLM:
    return RoutedForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def neurons_of(mlp: RoutedMLP) -> torch.Tensor:
    """Parent neurons of the routed experts [R, M]."""
    return mlp.neuron_index[mlp.cut.shared_width :].view(mlp.cut.num_routed, mlp.cut.expert_width)
