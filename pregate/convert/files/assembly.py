"""Putting a routed model together from a dense one's parts, and writing it as a checkpoint folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from pregate.model.checkpoint import Manifest
from pregate.model.config import RoutedConfig
from pregate.model.layers import kept_float32
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import PathRouter

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


def assemble(config: RoutedConfig, parent: Any, path_router: PathRouter | None = None) -> RoutedForCausalLM:
    """Make a `RoutedForCausalLM` around `parent`, whose FFNs are already `RoutedMLP`s; nothing is copied."""
    with torch.device("meta"):  # the parameters made here are thrown away at once
        model = RoutedForCausalLM(config)
    model.parent = parent
    model.path_router = path_router
    model.generation_config = parent.generation_config
    return model.eval()


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of the model at `source` into `folder`."""
    for pattern in _TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def write_checkpoint(model: RoutedForCausalLM, folder: Path, source: Path, manifest: Manifest, dtype: str) -> None:
    """Write `model` with its backbone and experts as `dtype` to `folder`, with the tokenizer files of `source`.

    Gates and path router stay float32 (`layers.FLOAT32_PARTS`).
    """
    copy_tokenizer(source, folder)  # before the manifest, which lists every file's hash
    for name, tensor in [*model.parent.named_parameters(), *model.parent.named_buffers()]:
        if tensor.is_floating_point() and not kept_float32(name):
            tensor.data = tensor.data.to(getattr(torch, dtype))
    model.manifest = manifest
    model.save_pretrained(folder)
    make_readable(folder)


def make_readable(folder: Path) -> None:
    """Give weights the mode of a checkpoint's other files: safetensors leaves them to the owner alone."""
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
