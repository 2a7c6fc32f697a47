"""A model's safetensors: read tensor by tensor, by name, so that only what was asked for is held; and written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from math import prod
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file

from pregate.base.errors import UserError
from pregate.base.options import Dtype
from pregate.model.checkpoint import open_shards
from pregate.model.file_hashes import short_digest
from pregate.model.folder import ModelFolder
from pregate.model.shard_file import INDEX, TORCH_NAMES, Shard, ShardFile, Stored, weight_files


class DenseShards:
    """The tensors of a model folder: one `model.safetensors`, or several files under an index.

    Only headers are read until `read` is called. UserError says what is wrong with a folder: no safetensors (pickled
    `.bin` files are not read), a file missing or damaged, or a quantised type. `opened`: shards to read in their place,
    those that an adapter and its parent make.
    """

    def __init__(self, folder: Path, option: str = "--model", opened: Sequence[Shard] | None = None) -> None:
        self.folder, self._option = folder, option
        self.tensors: dict[str, Stored] = {}
        self._shards: dict[str, Shard] = {}
        shards = self._open() if opened is None else opened
        #: The files that are read, and no other that lies beside them.
        self.files = [shard.path for shard in shards]
        for shard in shards:
            self.tensors |= shard.tensors
            self._shards |= dict.fromkeys(shard.tensors, shard)
        for name, stored in self.tensors.items():
            if stored.dtype not in TORCH_NAMES:
                allowed = f"allowed: {', '.join(TORCH_NAMES)}"
                raise UserError.of(option, folder, f"{name} is stored as {stored.dtype}; {allowed}")

    def _open(self) -> list[ShardFile]:
        try:
            files = weight_files(self.folder)
        except ValueError as error:
            raise UserError.of(self._option, self.folder, str(error)) from error
        shards = []
        for file in files:
            try:
                shards.append(ShardFile(file))
            except (ValueError, OSError) as error:
                raise self._unreadable(file, error) from error
        return shards

    @classmethod
    def of(cls, folder: ModelFolder) -> DenseShards:
        opened = None if folder.parent is None else open_shards(folder.path, folder.parent)[1]
        return cls(folder.path, folder.option, opened)

    def read(self, names: Collection[str], device: torch.device) -> dict[str, torch.Tensor]:
        """Copies of the named tensors on `device`; weights in float32, whatever they are stored as."""
        found: dict[str, torch.Tensor] = {}
        for name in names:
            shard = self._shards[name]
            try:
                tensor = shard.read(name)
            except (ValueError, OSError) as error:
                raise self._unreadable(shard.path, error) from error
            found[name] = tensor.to(device, torch.float32 if tensor.is_floating_point() else None)
        return found

    @property
    def weight_types(self) -> dict[str, str]:
        """What each weight is stored as, in torch's names."""
        named = {name: TORCH_NAMES[stored.dtype] for name, stored in self.tensors.items()}
        return {name: dtype for name, dtype in named.items() if "float" in dtype}

    @property
    def dtypes(self) -> list[str]:
        """What weights are stored as, the commonest first."""
        return [dtype for dtype, _count in Counter(self.weight_types.values()).most_common()]

    @property
    def dtype(self) -> Dtype:
        """What most weights are stored as; float32 where that is a type we do not write."""
        return next((dtype for dtype in get_args(Dtype) if [dtype] == self.dtypes[:1]), "float32")

    @property
    def stamp(self) -> str:
        """A digest of which files these are and when they were written: resolved path, size and mtime of each.

        It costs the same at any size, and tells two models of one architecture and index apart.
        """
        found = [(file.resolve(), file.stat()) for file in self.files]
        return short_digest([(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found])

    def _unreadable(self, file: Path, error: Exception) -> UserError:
        return UserError.of(self._option, self.folder, f"its weights cannot be loaded ({file.name}: {error})")


def write_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write one safetensors file that whoever may read the folder may read (safetensors itself makes it private)."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def write_index(folder: Path) -> None:
    """Write the index of the safetensors files in `folder`, from their headers."""
    weight_map: dict[str, str] = {}
    sizes = {"total_parameters": 0, "total_size": 0}
    for path in sorted(folder.glob("*.safetensors")):
        for name, stored in ShardFile(path).tensors.items():
            weight_map[name] = path.name
            sizes["total_parameters"] += prod(stored.shape)
            sizes["total_size"] += stored.stop - stored.start
    index: dict[str, Any] = {"metadata": sizes, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
