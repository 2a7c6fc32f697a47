"""Checkpoints to export, as they are and altered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.model.checkpoint import read_manifest, write_manifest


def convert_stock(dense: Path, out: Path, text: Path, shared: int = 2, active: int = 3, **method: Any) -> Path:
    """Convert to 8 experts, by the recipe that a stock class can express unless `method` says otherwise."""
    method = {"samples": 4, "sequence_length": 48} | method
    fields: dict[str, Any] = {"model": dense, "out": out, "experts": 8, "shared": shared, "active": active}
    dtype = method.pop("dtype", "float32")
    convert(ConvertOptions(recipe="stock", **(method), calibration=(text,), dtype=dtype, **fields))
    return out


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def altered(
    checkpoint: Path, out: Path, config: Mapping[str, Any], tensors: Mapping[str, Any], **manifest: Any
) -> Path:
    """A copy of a checkpoint with fields of its config, tensors by the end of their name, or its manifest changed."""
    shutil.copytree(checkpoint, out)
    fields = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(fields | config))
    for path in out.glob("*.safetensors"):
        own = load_file(path)
        for name in own:
            for end, change in tensors.items():
                if name.endswith(end):
                    own[name] = change(own[name])
        save_file(own, path, {"format": "pt"})
    write_manifest(out, replace(read_manifest(checkpoint), **manifest))
    return out
