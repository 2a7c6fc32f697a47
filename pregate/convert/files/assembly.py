"""Putting a routed model together from a dense one's parts, and writing it as a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pregate.model.checkpoint import Manifest, write_manifest
from pregate.model.config import RoutedConfig
from pregate.model.folder import ModelFolder
from pregate.model.layers import kept_float32
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import PathRouter


def assemble(config: RoutedConfig, parent: Any, path_router: PathRouter | None = None) -> RoutedForCausalLM:
    """Make a `RoutedForCausalLM` around `parent`, whose FFNs are already `RoutedMLP`s; nothing is copied."""
    with torch.device("meta"):  # the parameters made here are thrown away at once
        model = RoutedForCausalLM(config)
    model.parent = parent
    model.path_router = path_router
    return model.eval()


def write_checkpoint(
    model: RoutedForCausalLM, folder: Path, source: ModelFolder, manifest: Manifest, dtype: str
) -> None:
    """Write `model` with its backbone and experts as `dtype` to `folder`, with tokenizer and generation of `source`.

    Gates and path router stay float32 (`layers.FLOAT32_PARTS`).
    """
    for name, tensor in [*model.parent.named_parameters(), *model.parent.named_buffers()]:
        if tensor.is_floating_point() and not kept_float32(name):
            tensor.data = tensor.data.to(getattr(torch, dtype))
    PreTrainedModel.save_pretrained(model, folder)  # not the model's own, which would hash what is written over next
    source.carry_over(folder)
    make_readable(folder)
    write_manifest(folder, manifest)
    model.manifest = manifest


def make_readable(folder: Path) -> None:
    """Give weights the mode of a checkpoint's other files: safetensors leaves them to the owner alone."""
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
