"""Domains of text: what each holds to profile on, to train on and to measure on, and how a model's channels fire on it.

Shape letters: S windows, N tokens of a window, T tokens, D hidden width, I channels (neurons) of a dense FFN, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pregate.base.errors import UserError
from pregate.convert.progress import Progress
from pregate.convert.text.calibration import encode, encode_pool, pack_windows
from pregate.convert.text.documents import draw_documents, read_documents
from pregate.model.gated_mlp import GatedMLP, find_gated_mlps

#: One document in this many of a domain is kept back to measure on, and at most so many of them.
HELD_BACK_EVERY, MAX_HELD_BACK = 20, 16
#: Tokens that run through the model at a time, in whole windows.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Domain:
    """One domain's text as token ids: windows [S, N] to profile on, documents to train on, others to measure on."""

    name: str
    path: Path
    files: tuple[Path, ...]
    windows_SN: torch.Tensor
    rows: list[list[int]]
    held_back: list[list[int]]

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": str(self.path),
            "files": [str(file) for file in self.files],
            "num_windows": self.windows_SN.shape[0],
            "window_tokens": self.windows_SN.shape[1],
            "num_training_tokens": sum(map(len, self.rows)),
            "num_held_back_tokens": sum(map(len, self.held_back)),
        }


def read_domains(
    paths: Sequence[Path],
    tokenizer: Any,
    samples: int,
    length: int,
    pool_tokens: int,
    seed: int,
    text_field: str | None = None,
) -> list[Domain]:
    """Read each path (a file, or a folder with all below it) as one domain; at most `pool_tokens` to train on in all.

    Windows and training documents come from the same documents, the measured ones from others. UserError where a
    domain holds too little.
    """
    short = [path.resolve().stem for path in paths]
    share, domains = max(2, pool_tokens // len(paths)), []
    for path, stem in zip(paths, short, strict=True):
        documents = draw_documents(read_documents([path], length, "--domain", text_field), seed)
        files = tuple(dict.fromkeys(d.source for d in documents))
        kept = [d.text for i, d in enumerate(documents) if i % HELD_BACK_EVERY]
        measured = [encode(tokenizer, d.text, length) for d in documents[::HELD_BACK_EVERY][:MAX_HELD_BACK]]
        windows = pack_windows((encode(tokenizer, text, length) for text in kept), length, samples)
        rows = list(encode_pool(kept, tokenizer, length, share))
        held_back = [row for row in measured if len(row) > 1]
        if not windows or not rows or not held_back:
            raise UserError.of("--domain", path, "needs two documents of two tokens or more")
        name = stem if short.count(stem) == 1 else str(path)
        domains.append(Domain(name, path, files, torch.tensor(windows, dtype=torch.int64), rows, held_back))
    return domains


def interleaved(domains: Sequence[Domain]) -> list[list[int]]:
    """The training documents of all domains, one of each in turn; the longest domain's rest comes last."""
    longest = max(len(d.rows) for d in domains)
    return [d.rows[i] for i in range(longest) for d in domains if i < len(d.rows)]


@torch.no_grad()
def channel_means(model: Any, windows_SN: torch.Tensor, progress: Progress, name: str) -> list[torch.Tensor]:
    """How the channels of a dense `model` fire on a domain: per layer the mean over tokens of |h| [I], float64, CPU.

    Only sums are kept. h is what goes into the down projection, act(gate x) * (up x): Read-ME's score of a channel as
    the released code has it (the paper's section 3.1 masks the first projection's output and speaks of magnitude).
    """
    mlps = find_gated_mlps(model)
    sums = [torch.zeros(mlp.width, dtype=torch.float64, device=mlp.down.device) for mlp in mlps]

    def add(layer: int, h_TI: torch.Tensor) -> None:
        sums[layer] += h_TI.abs().sum(dim=0, dtype=torch.float64)

    with watched(down_projections(mlps), add), progress.stage(f"profiling {name}", len(windows_SN)) as advance:
        for ids_SN in windows_SN.split(max(1, BATCH_TOKENS // windows_SN.shape[1])):
            run_layers(model, ids_SN)
            advance(len(ids_SN))
    return [(total_I / windows_SN.numel()).cpu() for total_I in sums]


def run_layers(model: Any, ids_SN: torch.Tensor) -> None:
    """Run a dense model up to its head, for what hangs in it to see; padding, if any, is on the right."""
    model.base_model(input_ids=ids_SN.to(model.device), use_cache=False)


@contextmanager
def watched(modules: Sequence[nn.Module], see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Within the block `see(n, x [T, C])` is called with what the n-th of `modules` is given, a batch as rows."""

    def hook_of(index: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _module, inputs: see(index, inputs[0].reshape(-1, inputs[0].shape[-1]))

    handles = [module.register_forward_pre_hook(hook_of(index)) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def down_projections(mlps: Sequence[GatedMLP]) -> list[nn.Module]:
    """The modules whose input is h [T, I], one per layer."""
    return [next(m for m in mlp.module.children() if getattr(m, "weight", None) is mlp.down) for mlp in mlps]
