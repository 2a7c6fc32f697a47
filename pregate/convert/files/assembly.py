"""Weights as a checkpoint stores them, which figures are measured on; a routed model put together, and its folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pregate.base.dtypes import dtype_name
from pregate.base.errors import UserError
from pregate.convert.files.shards import write_index, write_shard
from pregate.model.checkpoint import Manifest, write_manifest
from pregate.model.config import RoutedConfig
from pregate.model.folder import ModelFolder
from pregate.model.layers import kept_float32
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import PathRouter
from pregate.model.read_gate import ReadNetwork
from pregate.model.shard_file import FACTORS, weight_files

#: Elements rounded at a time: bounds the copies made on the way.
ROUND_ELEMENTS = 1 << 22
SHARD = "model-{:05d}-of-{:05d}.safetensors"


def round_to(tensors: Iterable[torch.Tensor], dtype: torch.dtype, what: str) -> None:
    """Round float32 tensors in place to what `dtype` can hold; UserError where a value becomes infinite."""
    if dtype == torch.float32:
        return
    parts = (part for t in tensors if t.is_floating_point() for part in t.view(-1).split(ROUND_ELEMENTS))
    for part in parts:
        check_holds(part.copy_(part.to(dtype)), dtype, what)


def check_holds(rounded: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """UserError where a value of `what`, rounded to `dtype`, became infinite."""
    if not torch.isfinite(rounded).all():
        reason = f"{what} has values it cannot hold; allowed: bfloat16, float32"
        raise UserError.of("--dtype", dtype_name(dtype), reason)


def as_stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor as the checkpoint holds it: weights in `dtype`, integers as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def assemble(
    config: RoutedConfig, parent: Any, path_router: PathRouter | None = None, read_network: ReadNetwork | None = None
) -> RoutedForCausalLM:
    """Make a `RoutedForCausalLM` around `parent`, whose FFNs are already `RoutedMLP`s; nothing is copied. A
    `read_network` chooses from then on wherever `parent` runs."""
    with torch.device("meta"):  # the parameters made here are thrown away at once
        model = RoutedForCausalLM(config)
    model.parent = parent
    model.path_router = path_router
    model.read_network = read_network
    if read_network is not None:
        read_network.hang_in(model.routed_mlps)
    return model.eval()


#: Bytes of a checkpoint that is written as one file, its tensors being mapped meanwhile.
MOST_IN_ONE = 2 << 30


def write_with_router(
    config: RoutedConfig,
    router: PathRouter | ReadNetwork,
    folder: Path,
    source: ModelFolder,
    manifest: Manifest,
    factors: Mapping[str, torch.Tensor],
) -> None:
    """Write to `folder` the checkpoint `source`, its shards as they are, with `router` in one of its own; a small
    checkpoint becomes one file.

    `config` is the one it then has, `factors` as of `write_checkpoint`.
    """
    shards = weight_files(source.path)
    part = "path_router" if isinstance(router, PathRouter) else "read_network"
    tensors = {f"{part}.{name}": tensor.cpu() for name, tensor in router.state_dict().items()}
    if sum(path.stat().st_size for path in shards) <= MOST_IN_ONE:
        for path in shards:
            tensors |= load_file(path)
        write_shard(tensors, folder / "model.safetensors")
    else:
        for number, path in enumerate(shards, start=1):
            copied = folder / SHARD.format(number, len(shards) + 1)
            shutil.copyfile(path, copied)
            copied.chmod(0o644)
        write_shard(tensors, folder / SHARD.format(len(shards) + 1, len(shards) + 1))
        write_index(folder)
    if factors:
        write_shard(dict(factors), folder / FACTORS)
    config.save_pretrained(folder)
    source.carry_over(folder)
    write_manifest(folder, manifest)


def write_checkpoint(
    model: Any,
    folder: Path,
    source: ModelFolder,
    manifest: Manifest,
    dtype: str,
    factors: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Write a routed (or dense) `model` to `folder`, its weights as `dtype`, with tokenizer and generation of `source`.

    Gates and path router stay float32 (`layers.FLOAT32_PARTS`). `factors`: what some of its tensors are products of.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not kept_float32(name):
            tensor.data = as_stored(tensor.data, getattr(torch, dtype))
    PreTrainedModel.save_pretrained(model, folder)  # a routed model's own would hash what is written over next
    model.manifest = manifest
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors leaves it to the owner alone
    if factors:
        write_shard(dict(factors), folder / FACTORS)
    source.carry_over(folder)
    write_manifest(folder, manifest)
