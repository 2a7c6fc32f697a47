"""Reading a dense model's safetensors tensor by tensor, by name; nothing is held but what was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pregate.base.dtypes import dtype_name
from pregate.base.errors import UserError
from pregate.model.shard_file import TORCH_NAMES, weight_files

#: Types that tensors may be stored in, by safetensors' names.
STORED_TYPES: Mapping[str, torch.dtype] = MappingProxyType({n: getattr(torch, t) for n, t in TORCH_NAMES.items()})


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and its shape; `dtype` as safetensors names it (F32, BF16, ...)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_weight(self) -> bool:
        return STORED_TYPES[self.dtype].is_floating_point


class DenseShards:
    """The tensors of a dense model folder: one `model.safetensors`, or several files under an index.

    Only headers are read until `read` is called, and no file stays open or mapped afterwards. UserError says what is
    wrong with a folder: no safetensors (pickled `.bin` files are not read), a file missing or damaged, or a
    quantised type.
    """

    def __init__(self, folder: Path, option: str = "--model") -> None:
        self.folder, self._option = folder, option
        self.tensors: dict[str, StoredTensor] = {}
        #: The files that are read, and no other that lies beside them.
        try:
            self.files = weight_files(folder)
        except ValueError as error:
            raise UserError.of(option, folder, str(error)) from error
        for file in self.files:
            with self._open(file) as shard:
                for name in shard.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    self.tensors[name] = self._describe(file, name, shard.get_slice(name))

    def read(self, names: Collection[str], device: torch.device) -> dict[str, torch.Tensor]:
        """Copies of the named tensors on `device`; weights in float32, whatever they are stored as."""
        found: dict[str, torch.Tensor] = {}
        for name in names:
            stored = self.tensors[name]
            dtype = torch.float32 if stored.is_weight else None
            with self._open(stored.file) as shard:  # opened anew each time: closing unmaps the pages that were touched
                found[name] = shard.get_tensor(name).to(device, dtype, copy=True)
        return found

    @property
    def dtypes(self) -> list[str]:
        """What weights are stored as, in torch's names, the commonest first."""
        return [dtype for dtype, _count in Counter(self._weight_types().values()).most_common()]

    @property
    def dtype_exceptions(self) -> dict[str, str]:
        """Weights stored otherwise than the commonest type, by name: norms in float32 among bfloat16, say."""
        commonest = self.dtypes[:1]
        return {name: dtype for name, dtype in self._weight_types().items() if [dtype] != commonest}

    def _weight_types(self) -> dict[str, str]:
        stored = {name: tensor.dtype for name, tensor in self.tensors.items() if tensor.is_weight}
        return {name: dtype_name(STORED_TYPES[dtype]) for name, dtype in stored.items()}

    def _describe(self, file: Path, name: str, stored: Any) -> StoredTensor:
        if stored.get_dtype() not in STORED_TYPES:
            allowed = f"allowed: {', '.join(STORED_TYPES)}"
            raise UserError.of(self._option, self.folder, f"{name} is stored as {stored.get_dtype()}; {allowed}")
        return StoredTensor(file, tuple(stored.get_shape()), stored.get_dtype())

    @contextmanager
    def _open(self, file: Path) -> Iterator[Any]:
        try:
            with safe_open(file, framework="pt") as shard:
                yield shard
        except (SafetensorError, OSError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise UserError.of(
                self._option, self.folder, f"its weights cannot be loaded ({file.name}: {reason})"
            ) from error
