"""`StepLayout`: which rows of a step belong to which sequence, and where their context lies in the KV cache.

A step is one row of tokens: first the decode tokens, one per sequence, then the prompt chunks end to end.

Shape letters: T new tokens, B decoding sequences, C context tokens, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pregate.base.device import to_device
from pregate.router.engine.kv_cache import PagedKV

#: Of the rows of a view over lanes at least this share must be sequences of the step, else gathering reads less.
_FULL_ENOUGH = 0.5


@dataclass(frozen=True)
class SequenceSlice:
    """Tokens `start` to `stop` of a sequence whose context lies in `blocks` (int [n], in order)."""

    blocks: Sequence[int] | np.ndarray
    start: int
    stop: int


@dataclass(frozen=True)
class Lanes:
    """Decoding sequences whose blocks lie side by side, at equal distances: `num` runs of slots from `first`, `stride`
    apart, in which row `row_B[b]` is sequence b's (None: every run is a sequence, in order)."""

    first: int
    stride: int
    num: int
    row_B: torch.Tensor | None


@dataclass(frozen=True)
class PromptChunk:
    """Rows row_start .. row_start + num_rows - 1 of the step: a chunk whose context, itself included, ends it."""

    row_start: int
    num_rows: int
    length: int
    first_slot: int | None
    block_N: torch.Tensor | None


@dataclass(frozen=True)
class Rows:
    """What the CPU's kernels read of a step (`kernels/cpu/attention.py`), int64: the new tokens' slots; of the rows
    that they let attend, which come first, how long each one's context is and whose it is of `block_BN`."""

    slot_T: np.ndarray
    length_A: np.ndarray
    table_A: np.ndarray
    block_BN: np.ndarray


@dataclass(frozen=True)
class StepLayout:
    """`slot_T`: the new tokens' slots. `length` is the longest context of a decoding sequence, `lengths_B` are all of
    them; their context is read through `lanes` where it can be, else gathered by `block_BN`, padded with block 0.
    With `rows`, where the CPU's kernels serve, there is neither, for they need none."""

    kv: PagedKV
    slot_T: torch.Tensor
    lengths_B: torch.Tensor
    length: int
    same_length: bool
    lanes: Lanes | None
    block_BN: torch.Tensor | None
    chunks: tuple[PromptChunk, ...]
    rows: Rows | None = None
    _masks: dict[object, torch.Tensor | None] = field(default_factory=dict)

    @property
    def num_decodes(self) -> int:
        return len(self.lengths_B)

    @classmethod
    def build(cls, kv: PagedKV, slices: Sequence[SequenceSlice], device: str = "cpu") -> StepLayout:
        """Lay out `slices`, those of one token first."""
        num_decodes = sum(s.stop - s.start == 1 for s in slices)
        assert all(s.stop - s.start == 1 for s in slices[:num_decodes]), "slices of one token come first"
        tables = [_table(s, kv.block_size) for s in slices]
        size, device_of = kv.block_size, torch.device(device)
        position_T = [np.arange(s.start, s.stop) for s in slices]
        slot_T = [t[p // size] * size + p % size for t, p in zip(tables, position_T, strict=True)]
        first_B = [_first_slot(table, size) for table in tables]
        lengths = np.array([s.stop for s in slices[:num_decodes]], dtype=np.int64)
        length = int(lengths.max(initial=0))
        lanes = block_BN = rows = None
        if kv.kernels is not None:
            order_B = np.arange(num_decodes)
            rows = Rows(np.concatenate(slot_T), lengths, order_B, _padded(tables[:num_decodes]))
        elif (lanes := _lanes(first_B[:num_decodes], length, kv.num_slots, device_of)) is None:
            block_BN = to_device(torch.from_numpy(_padded(tables[:num_decodes])), device_of)
        chunks, row = [], num_decodes
        for piece, table, first in zip(slices[num_decodes:], tables[num_decodes:], first_B[num_decodes:], strict=True):
            block_N = to_device(torch.from_numpy(table), device_of) if first is None else None
            chunks.append(PromptChunk(row, piece.stop - piece.start, piece.stop, first, block_N))
            row += piece.stop - piece.start
        return cls(
            kv,
            to_device(torch.from_numpy(np.concatenate(slot_T)), device_of),
            to_device(torch.from_numpy(lengths), device_of),
            length,
            bool((lengths == length).all()),
            lanes,
            block_BN,
            tuple(chunks),
            rows,
        )

    @classmethod
    def of_decodes(
        cls, kv: PagedKV, slot_B: torch.Tensor, lengths_B: torch.Tensor, block_BN: torch.Tensor
    ) -> StepLayout:
        """A layout of decode tokens alone, on tensors that may change: nothing in it depends on what they say."""
        length = block_BN.shape[1] * kv.block_size
        return cls(kv, slot_B, lengths_B, length, same_length=False, lanes=None, block_BN=block_BN, chunks=())

    def mask(self, key: object, make: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """The mask that `make` makes, once per step for each `key`: layers share it."""
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]


def decode_places(slices: Sequence[SequenceSlice], block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of slices of one token, on the host: each one's slot [B] and the blocks of its context [B, N], padded with 0."""
    tables = [_table(s, block_size) for s in slices]
    slots = [int(table[-1]) * block_size + (s.stop - 1) % block_size for s, table in zip(slices, tables, strict=True)]
    return torch.tensor(slots, dtype=torch.int64), torch.from_numpy(_padded(tables))


def _table(piece: SequenceSlice, block_size: int) -> np.ndarray:
    """The blocks of a slice's context, itself included."""
    return np.asarray(piece.blocks, dtype=np.int64)[: -(-piece.stop // block_size)]


def _first_slot(table: np.ndarray, size: int) -> int | None:
    """The first slot of a context whose blocks lie side by side, else None."""
    first, last = int(table[0]), int(table[-1])
    beside = last - first == len(table) - 1 and (len(table) < 3 or bool((np.diff(table) == 1).all()))
    return first * size if beside else None


def _lanes(first_B: list[int | None], length: int, num_slots: int, device: torch.device) -> Lanes | None:
    """How one strided view reads all contexts; None where it cannot.

    Example: first slots [0, 64, 192] and length 20: 4 runs 64 apart, in which the sequences are rows 0, 1 and 3.
    """
    known = [first for first in first_B if first is not None]
    if not known or len(known) < len(first_B):
        return None
    first_of = np.array(known)
    first = int(first_of.min())
    stride = int(np.gcd.reduce(first_of - first)) or 1
    num = int(first_of.max() - first) // stride + 1
    if len(known) < num * _FULL_ENOUGH or first + (num - 1) * stride + length > num_slots:
        return None
    row_B = (first_of - first) // stride
    in_order = num == len(known) and bool((np.diff(row_B) == 1).all())
    return Lanes(first, stride, num, None if in_order else to_device(torch.from_numpy(row_B), device))


def _padded(tables: list[np.ndarray]) -> np.ndarray:
    padded = np.zeros((len(tables), max(map(len, tables), default=0)), dtype=np.int64)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded
