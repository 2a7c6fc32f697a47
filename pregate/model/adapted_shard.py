"""Tensors of a checkpoint that are not on the disk: made of an adapter's and its parent's when they are read.

Shape letters: D hidden width, I neurons of the dense FFN, N rows taken of them, M expert width, R routed experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pregate.model.shard_file import TORCH_NAMES, ShardFile, Stored, tensors_of

if TYPE_CHECKING:
    import torch

    from pregate.model.adapter import AdapterRecord

#: Parts of a layer's FFN whose rows are the parent's, in the order that `neuron_index` says.
_PARTS = ("shared.gate_up_proj", "shared.down_proj", "experts.gate_up_proj", "experts.down_proj")


class AdaptedTensors:
    """Makes a checkpoint's tensors: held in the adapter's files, products of factors held there, or the parent's, which
    are gathered row by row where they are an FFN's, and changed by the low-rank changes that are held.

    Of the parent it keeps the down projection that single units were last read of, and nothing else. ValueError for a
    header that is none, and for a tensor that there is nothing to make of.
    """

    def __init__(self, held: Sequence[ShardFile], parent: Sequence[ShardFile], record: AdapterRecord) -> None:
        self._held = {name: shard for shard in held for name in shard.tensors}
        self._parent = {name: shard for shard in parent for name in shard.tensors}
        self._record = record
        self._last: tuple[str, torch.Tensor | None] = ("", None)
        self.tensors: dict[str, Stored] = {}
        for header in record.shards.values():
            self.tensors |= tensors_of(header.encode(), file_bytes(header))
        for name in self.tensors:
            own = any(held in self._held for held in (name, f"{name}.int8", f"{name}.projection"))
            sources = self._record.ffns.get(_ffn_part(name)[0], (self._parent_name(name),))
            if not own and not self._parent.keys() >= set(sources):
                raise ValueError(f"neither the adapter nor its parent has what {name} is made of")

    def finish_check(self) -> None:
        """`ShardFile.finish_check` of the adapter's files and its parent's."""
        for shard in dict.fromkeys([*self._held.values(), *self._parent.values()]):
            shard.finish_check()

    def read(self, name: str, index: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of a tensor, or of entry `index` of its first dimension, as the checkpoint has it, `out` unused."""
        import torch

        from pregate.model.factors import changed, dequantised, projected

        dtype = getattr(torch, TORCH_NAMES[self.tensors[name].dtype])
        if name in self._held:
            return self._held[name].read(name, index).to(dtype)
        if f"{name}.int8" in self._held:
            return _entry(dequantised(*(self._whole(f"{name}.{part}") for part in ("int8", "scale"))), index)
        if f"{name}.projection" in self._held:
            factors = (self._whole(f"{name}.{part}") for part in ("projection", "mean", "scale"))
            return _entry(projected(self.read(self._record.names[name]), *factors), index)
        tensor = self._of_parent(name, index)
        if tensor.is_floating_point():
            tensor = tensor.float().to(dtype)  # as convert does: every weight is float32 on its way
        for up, down in self._changes(name, index):
            tensor = changed(tensor, up, down)
        return tensor

    def _parent_name(self, name: str) -> str:
        return self._record.names.get(name, name.removeprefix("parent."))

    def _of_parent(self, name: str, index: int | None) -> torch.Tensor:
        prefix, part = _ffn_part(name)
        if prefix not in self._record.ffns:
            return _entry(self._parents(self._parent_name(name)), index)
        gate, up, down = self._record.ffns[prefix]
        rows = self._rows(prefix, part, self.tensors[name].shape, index)
        return self._down(down, rows, index) if part.endswith("down_proj") else self._gate_up(gate, up, rows)

    def _rows(self, prefix: str, part: str, shape: tuple[int, ...], index: int | None) -> torch.Tensor:
        """Neurons [M] or [R, M] that a part of an FFN holds, int64; shared rows come first, then expert by expert."""
        index_N = self._whole(f"{prefix}neuron_index").long()
        width = shape[-1] if part.endswith("down_proj") else shape[-2] // 2
        if part.startswith("shared"):
            return index_N[:width]
        rows_RM = index_N[len(index_N) - shape[0] * width :].view(-1, width)
        return rows_RM if index is None else rows_RM[index]

    def _gate_up(self, gate: str, up: str, rows: torch.Tensor) -> torch.Tensor:
        """[(R,) 2M, D]."""
        import torch

        flat = rows.flatten().tolist()
        shift = self._parent[gate].tensors[gate].shape[0] // 2 if gate == up else 0  # fused: up lies below gate
        both = [self._parent[n].read_rows(n, [r + s for r in flat]) for n, s in ((gate, 0), (up, shift))]
        return torch.cat([part.view(*rows.shape, -1) for part in both], dim=-2)

    def _down(self, name: str, rows: torch.Tensor, index: int | None) -> torch.Tensor:
        """[(R,) D, M]. Columns cannot be read alone; so the matrix is kept for the next unit of the layer."""
        kept, whole_DI = self._last
        if kept != name or whole_DI is None:
            whole_DI = self._parents(name)
        if index is not None:
            self._last = (name, whole_DI)
        return whole_DI[:, rows.flatten()].view(-1, *rows.shape).movedim(0, -2).contiguous()

    def _changes(self, name: str, index: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        stage = 0
        while f"{name}.up.{stage}" in self._held:
            up, down = (f"{name}.{part}.{stage}" for part in ("up", "down"))
            yield self._held[up].read(up, index), self._held[down].read(down, index)
            stage += 1

    def _whole(self, name: str) -> torch.Tensor:
        return self._held[name].read(name)

    def _parents(self, name: str) -> torch.Tensor:
        return self._parent[name].read(name)


def _entry(tensor: torch.Tensor, index: int | None) -> torch.Tensor:
    return tensor if index is None else tensor[index].clone()


def _ffn_part(name: str) -> tuple[str, str]:
    """Prefix and part of a tensor that is rows of an FFN; ("", "") of another."""
    part = next((part for part in _PARTS if name.endswith(f".{part}")), "")
    return name.removesuffix(part) if part else "", part


def file_bytes(header: str) -> int:
    """The size of the file that begins with `header`."""
    ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
    return 8 + len(header.encode()) + max(ends, default=0)


class AdaptedShard:
    """What `ShardFile` is of a file, of one that is not there; `path` is where it would lie."""

    def __init__(self, path: Path, header: str, source: AdaptedTensors) -> None:
        self.path, self.read, self._header = path, source.read, header.encode()
        self.finish_check = source.finish_check
        self.tensors: Mapping[str, Stored] = tensors_of(self._header, file_bytes(header))

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The bytes of the file, a tensor at a time."""
        import torch

        yield len(self._header).to_bytes(8, "little") + self._header
        for name in sorted(self.tensors, key=lambda name: self.tensors[name].start):
            data: Any = self.read(name).contiguous().flatten().view(torch.uint8).numpy()
            yield memoryview(data)
