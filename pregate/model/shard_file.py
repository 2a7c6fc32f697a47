"""Safetensors files read without mapping them: what was read stays what it was, whatever happens to the file.

8 bytes   N, little-endian
N bytes   JSON: {name: {"dtype", "shape", "data_offsets": [from, to)}}
the rest  the tensors' bytes
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pregate.base.strict_json import parse_json
from pregate.model.file_hashes import is_known
from pregate.model.read_check import ReadCheck, Recorded

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: Beside the weights, where some of them are products (`factors.py`).
FACTORS = "factors.safetensors"
#: Bytes of a number of each type that weights or buffers may have here, and torch's name of it (by name, since
#: importing this loads no torch). Weights are floating, the others occur among buffers.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "BOOL": 1}
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TORCH_NAMES |= {"I64": "int64", "I32": "int32", "BOOL": "bool"}
#: What files of our own may hold besides: neuron numbers and quantised tables of adapters.
_READ_BYTES = ITEM_BYTES | {"I8": 1, "U16": 2}
_READ_NAMES = TORCH_NAMES | {"I8": "int8", "U16": "uint16"}
_MOST_HEADER_BYTES = 100 << 20
#: Names of what quantisers write beside or in place of weights.
_QUANTISER = re.compile(
    r"(^|\.)(qweight|qzeros|scales|g_idx|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB"
    r"|weight_(packed|scale|scale_2|scale_inv|shape|zero_point|format)|(input|output|k|v)_scale)$"
)


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: safetensors' name of its type, its shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_quantised(self) -> bool:
        """Whether numbers are packed into it, or of a type that only quantisers write."""
        return self.dtype not in ITEM_BYTES or (self.dtype == "I32" and len(self.shape) > 1)


class Shard(Protocol):
    """What a checkpoint is read from: a file, or what an adapter and its parent make in place of one."""

    path: Path
    tensors: Mapping[str, Stored]

    def read(self, name: str, index: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of a tensor, or of entry `index` of its first dimension, as stored; in `out` where it can be."""
        ...

    def finish_check(self) -> None:
        """Return when it is sure that all of what it is read from is what was recorded."""
        ...


class ShardFile:
    """An open safetensors file. Only its header is held; ValueError says why it is not one that can be read.

    With a `recorded` hash it is hashed while it is read, unless it is known to have that one; whoever uses what was
    read must call `finish_check` before, from the same thread.
    """

    def __init__(self, path: Path, recorded: Recorded | None = None) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._stamp = self._stamp_now()
        self._check = None
        opened = os.fstat(self._file.fileno())
        if recorded is not None and not is_known(path, recorded.sha256, opened):
            self._check = ReadCheck(path, self._file.fileno(), opened, recorded)
        size = self._stamp[0]
        num_bytes = int.from_bytes(self._file.read(8), "little")
        if not 2 <= num_bytes <= min(size - 8, _MOST_HEADER_BYTES):
            raise ValueError(f"its header would be {num_bytes} bytes of {size}")
        self.tensors: Mapping[str, Stored] = tensors_of(self._file.read(num_bytes), size)

    def read(self, name: str, index: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of a tensor, or of entry `index` of its first dimension, as stored: `out`, which is contiguous and of
        this shape, where it is of the stored dtype, too.

        ValueError when the file was written over or cut since it was opened: it is not what was checked.
        """
        stored = self.tensors[name]
        shape = stored.shape if index is None else stored.shape[1:]
        num_bytes = prod(shape) * _READ_BYTES[stored.dtype]
        return self._copy(stored.dtype, shape, [(num_bytes, stored.start + (index or 0) * num_bytes)], out)

    def read_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Copies of rows of a matrix [I, D], in the order of `rows`; nothing else is read."""
        stored = self.tensors[name]
        row_bytes = prod(stored.shape[1:]) * _READ_BYTES[stored.dtype]
        parts = [(row_bytes, stored.start + row * row_bytes) for row in rows]
        return self._copy(stored.dtype, (len(rows), *stored.shape[1:]), parts)

    def _copy(
        self, dtype: str, shape: tuple[int, ...], parts: list[tuple[int, int]], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A tensor, `out` if it is of this dtype, of the file's bytes at `parts`, (number, from) each, one after the
        other."""
        import torch

        kind = getattr(torch, _READ_NAMES[dtype])
        data = torch.empty(shape, dtype=kind) if out is None or out.dtype != kind else out
        assert data.shape == torch.Size(shape), f"{data.shape} is not the stored shape {shape}"
        buffer: Any = data.view(-1).view(torch.uint8).numpy()  # the same memory: a view, or an error
        view, done = memoryview(buffer), 0
        for number, start in parts:
            self._fill(view[done : done + number], start)
            done += number
        if self._stamp_now() != self._stamp:
            raise ValueError("was changed after it was opened")
        return data

    def finish_check(self) -> None:
        """Return when it is sure that what was read, here and by others at this path, is what was recorded.

        Raises what is said of a file that is not; ValueError where it was written over or replaced since it was opened.
        """
        if self._check is not None:
            self._check.finish()
            self._check = None
        here, now = os.fstat(self._file.fileno()), self.path.stat()
        if self._stamp_now() != self._stamp or (here.st_ino, here.st_dev) != (now.st_ino, now.st_dev):
            raise ValueError("was changed after it was opened")

    def read_ahead(self, name: str, index: int) -> None:
        """Have the system bring an entry of a tensor into its cache; returns at once."""
        stored = self.tensors[name]
        num_bytes = (stored.stop - stored.start) // max(stored.shape[0], 1)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            start = stored.start + index * num_bytes
            os.posix_fadvise(self._file.fileno(), start, num_bytes, os.POSIX_FADV_WILLNEED)

    def _fill(self, buffer: memoryview, start: int) -> None:
        if self._check is not None:
            self._check.up_to(start + len(buffer))
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file.fileno(), [buffer[done:]], start + done)
            if not count:
                break
            done += count
        if done < len(buffer):
            raise ValueError("was changed after it was opened")

    def _stamp_now(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns


def tensors_of(header: bytes, size: int) -> dict[str, Stored]:
    """The tensors that the header of a file of `size` bytes names. ValueError where it is none."""
    try:
        fields = parse_json(header)
        fields.pop("__metadata__", None)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    return {name: _stored(name, entry, 8 + len(header), size) for name, entry in fields.items()}


def read_header(path: Path) -> bytes:
    """The header of a file that `ShardFile` can open, byte for byte."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _stored(name: str, fields: Mapping, base: int, size: int) -> Stored:
    try:
        start, stop = fields["data_offsets"]
        stored = Stored(fields["dtype"], tuple(fields["shape"]), base + start, base + stop)
        if not base <= stored.start <= stored.stop <= size:
            raise ValueError("its bytes lie outside the file; is it cut short?")
        if stored.dtype in ITEM_BYTES and prod(stored.shape) * ITEM_BYTES[stored.dtype] != stop - start:
            raise ValueError("its shape does not fit its bytes")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tensor {name}: {error}") from error
    return stored


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model in `folder`, and no other that lies beside them.

    ValueError where there is none (pickled `.bin` files are not read), or an index names one that is missing.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        pickled = sorted(folder.glob("*.bin"))
        if pickled:
            reason = f"{pickled[0].name} is a pickle, which pregate does not read; save the model as safetensors first"
            raise ValueError(f"{reason} (transformers: from_pretrained, save_pretrained)")
        raise ValueError(f"its weights cannot be loaded (neither {SINGLE} nor {INDEX})")
    try:
        names = sorted(set(parse_json(index.read_text(encoding="utf-8-sig"))["weight_map"].values()))
        paths = [folder / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{INDEX} is no index of shards ({error!r})") from error
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{INDEX} names {path.name}, which is missing")
    return paths


def quantised_tensor(files: Iterable[Path]) -> str:
    """The first tensor that only a quantised model has, as "name is stored as type"; empty where all weights are plain.

    ValueError names a file that cannot be read.
    """
    for path in files:
        try:
            tensors = ShardFile(path).tensors
        except (ValueError, OSError) as error:
            raise ValueError(f"its weights cannot be loaded ({path.name}: {error})") from error
        for name, stored in tensors.items():
            if stored.is_quantised or _QUANTISER.search(name):
                return f"{name} is stored as {stored.dtype}"
    return ""
