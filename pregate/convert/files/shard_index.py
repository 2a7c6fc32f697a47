"""Shards of a checkpoint, and the index that tells which of them holds a tensor."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pregate.convert.files.shards import STORED_TYPES
from pregate.model.shard_file import INDEX


def write_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write one safetensors file that whoever may read the folder may read (safetensors itself makes it private)."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def write_index(folder: Path) -> None:
    """Write the index of the safetensors files in `folder`, from their headers."""
    weight_map: dict[str, str] = {}
    num_parameters, num_bytes = 0, 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (safe_open is not a mapping)
                part = shard.get_slice(name)
                weight_map[name] = path.name
                num_parameters += prod(part.get_shape())
                num_bytes += prod(part.get_shape()) * STORED_TYPES[part.get_dtype()].itemsize
    index = {"metadata": {"total_parameters": num_parameters, "total_size": num_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
