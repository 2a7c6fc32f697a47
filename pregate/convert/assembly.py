"""Putting a routed model together from a dense one's parts, and writing it as a checkpoint folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from pregate.convert.cmoe import NeuronSplit
from pregate.model.checkpoint import Manifest
from pregate.model.config import LayerCut, RoutedConfig
from pregate.model.gated_mlp import GatedMLP
from pregate.model.layers import RoutedMLP, kept_float32
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


@torch.no_grad()
def cut_layer(mlp: GatedMLP, split: NeuronSplit, cut: LayerCut, config: RoutedConfig) -> RoutedMLP:
    """Regroup a dense FFN's rows as `split` says; the gates are left zero. No weight changes its value."""
    routed = RoutedMLP(mlp.layer, mlp.hidden_size, cut, config, hold_experts=True)
    routed.parent_width = mlp.width
    routed = routed.to(mlp.down.device)
    routed.neuron_index.copy_(torch.from_numpy(split.neuron_index))
    if routed.shared is not None:
        shared = torch.from_numpy(split.shared)
        routed.shared.gate_up_proj.copy_(torch.cat([mlp.gate[shared], mlp.up[shared]]))
        routed.shared.down_proj.copy_(mlp.down[:, shared])
    if routed.experts is None:
        return routed
    for expert, neurons in enumerate(torch.from_numpy(split.routed_RM)):
        routed.experts.gate_up_proj[expert].copy_(torch.cat([mlp.gate[neurons], mlp.up[neurons]]))
        routed.experts.down_proj[expert].copy_(mlp.down[:, neurons])
    return routed


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
