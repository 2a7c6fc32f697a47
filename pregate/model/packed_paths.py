"""`PackedPaths`: the paths of one growing sequence, without padding. NumPy only.

Shape letters: T tokens, L layers, K experts of a token at most, N expert ids of all tokens and layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pregate.base.errors import ProtocolError
from pregate.model.paths import Paths

if TYPE_CHECKING:
    from pregate.model.config import LayerCut

#: Layers and columns that paths from elsewhere may have: their products stay far from overflow.
_MOST_LAYERS, _MOST_COLUMNS, _MOST_TOKENS = 4096, 255, 1 << 24
#: Tokens that are checked at a time.
_CHECKED_TOKENS = 4096
#: Room is made for this share more than is needed, so that appending one token costs little on average.
_GROWTH = 1.5


class _Buffer:
    """Values end to end in an array with room to grow."""

    def __init__(self, values: np.ndarray) -> None:
        self._array, self.size = values, len(values)

    @property
    def values(self) -> np.ndarray:
        return self._array[: self.size]

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    def append(self, values: np.ndarray) -> None:
        if not len(values):  # what came from elsewhere cannot be written to
            return
        size = self.size + len(values)
        if size > len(self._array):
            array = np.empty((int(size * _GROWTH) + 1, *self._array.shape[1:]), dtype=self._array.dtype)
            array[: self.size] = self.values
            self._array = array
        self._array[self.size : size] = values
        self.size = size


class PackedPaths:
    """Expert ids of the real entries alone, token by token and layer by layer, a byte each where no id is above 255;
    how many each token has in each layer (a byte each), which is left out where all tokens have the same; weights
    where there are any.

    Example: ids [[[0, 3], [2, -1]]] are packed to [0, 3, 2] and the counts [[2, 1]].
    """

    def __init__(self, paths: Paths, max_id: int) -> None:
        self._k, self._exact = paths.ids.shape[2], paths.exact
        self._num_layers = paths.ids.shape[1]
        real, counts = paths.ids >= 0, (paths.ids >= 0).sum(axis=2, dtype=np.uint8)
        self._ids = _Buffer(paths.ids[real].astype(np.uint8 if max_id < 256 else np.int16))
        self._weights = None if paths.weights is None else _Buffer(paths.weights[real])
        self._same = counts[0].copy() if len(counts) and (counts == counts[0]).all() else None
        self._counts = None if self._same is not None else _Buffer(counts)
        self.num_tokens = len(counts)

    @classmethod
    def of(cls, paths: Paths, max_id: int | None = None) -> PackedPaths:
        """Pack `paths`; `max_id` is the largest id that a later token may have (None: any)."""
        return cls(paths, np.iinfo(np.int16).max if max_id is None else max_id)

    @property
    def nbytes(self) -> int:
        parts = (self._ids, self._weights, self._counts)
        return sum(part.nbytes for part in parts if part is not None)

    def append(self, paths: Paths) -> None:
        """Add the paths of the next tokens, of as many columns as the first."""
        assert paths.ids.shape[1:] == (self._num_layers, self._k), "paths of another router"
        assert (paths.weights is None) == (self._weights is None), "all tokens have weights or none has"
        real = paths.ids >= 0
        counts = real.sum(axis=2, dtype=np.uint8)
        if self._same is not None and not (counts == self._same).all():
            self._counts, self._same = _Buffer(np.tile(self._same, (self.num_tokens, 1))), None
        if self._counts is not None:
            self._counts.append(counts)
        self._ids.append(paths.ids[real].astype(self._ids.values.dtype))
        if self._weights is not None and paths.weights is not None:
            self._weights.append(paths.weights[real])
        self.num_tokens += len(counts)

    def slice(self, start: int, stop: int) -> Paths:
        """The paths of tokens `start` to `stop`, padded to the router's columns."""
        num = stop - start
        if self._same is not None:
            counts_TL = np.broadcast_to(self._same, (num, self._num_layers))
            first = start * int(self._same.sum())
        else:
            assert self._counts is not None
            counts_TL = self._counts.values[start:stop]
            # Counted from the nearer end: a decode step reads the last token.
            counts = self._counts.values
            near = start < self.num_tokens // 2
            first = int(counts[:start].sum()) if near else self._ids.size - int(counts[start:].sum())
        last = first + int(counts_TL.sum())
        real = np.arange(self._k) < counts_TL[..., None]
        ids = np.full(real.shape, -1, dtype=np.int16)
        ids[real] = self._ids.values[first:last]
        if self._weights is None:
            return Paths(ids, None, self._exact)
        weights = np.zeros(real.shape, dtype=np.float32)
        weights[real] = self._weights.values[first:last]
        return Paths(ids, weights, self._exact)

    # ---- on the wire ----

    def to_frames(self) -> list[bytes]:
        """[a header, counts, ids, weights] for `from_frames`, little-endian and without the room to grow."""
        counts = self._same if self._counts is None else self._counts.values
        assert counts is not None
        ids, weights = self._ids.values, None if self._weights is None else self._weights.values
        shape = (self.num_tokens, self._num_layers, self._k)
        header = np.array([*shape, self._exact, self._counts is None, ids.itemsize, weights is not None], dtype="<i8")
        parts = (header, counts, ids.astype(ids.dtype.newbyteorder("<"), copy=False))
        data = b"" if weights is None else weights.astype("<f4", copy=False).tobytes()
        return [*(part.tobytes() for part in parts), data]

    @classmethod
    def from_frames(cls, frames: Sequence[bytes]) -> PackedPaths:
        """Undo `to_frames`. ProtocolError where sizes and counts do not fit each other; `check` looks at the ids."""
        if len(frames) != 4 or len(frames[0]) != 7 * 8:
            raise ProtocolError(f"paths: {len(frames)} frames, or a header of another size")
        num_tokens, num_layers, k, exact, same, item, weighted = np.frombuffer(frames[0], dtype="<i8").tolist()
        if not (0 <= num_tokens <= _MOST_TOKENS and 0 <= num_layers <= _MOST_LAYERS and 0 <= k <= _MOST_COLUMNS):
            raise ProtocolError(f"paths of shape ({num_tokens}, {num_layers}, {k}): out of bounds")
        if {exact, same, weighted} - {0, 1} or item not in (1, 2):
            raise ProtocolError("paths: a header of unknown flags")
        if len(frames[1]) != num_layers * (1 if same else num_tokens) or len(frames[2]) % item:
            raise ProtocolError(f"paths: {len(frames[1])} counts for {num_tokens} tokens in {num_layers} layers")
        counts = np.frombuffer(frames[1], dtype=np.uint8)
        ids = np.frombuffer(frames[2], dtype=np.uint8 if item == 1 else "<i2")
        size = int(counts.sum()) * (num_tokens if same else 1)
        if counts.max(initial=0) > k or len(ids) != size or len(frames[3]) != 4 * size * weighted:
            raise ProtocolError(f"paths: counts of {size} ids for {len(ids)} ids, {len(frames[3])} bytes of weights")
        packed = cls.__new__(cls)
        packed._k, packed._exact, packed._num_layers, packed.num_tokens = k, bool(exact), num_layers, num_tokens
        packed._same = counts if same else None
        packed._counts = None if same else _Buffer(counts.reshape(num_tokens, num_layers))
        packed._ids = _Buffer(ids.astype(np.uint8 if item == 1 else np.int16, copy=False))
        weights = np.frombuffer(frames[3], dtype="<f4").astype(np.float32, copy=False)
        packed._weights = _Buffer(weights) if weighted else None
        return packed

    def check(self, cuts: Sequence[LayerCut], num_tokens: int, others: PackedPaths) -> None:
        """Raise ProtocolError unless these are paths of so many tokens through layers cut like that, and those of later
        tokens can be appended: they have the form of `others`."""
        if self.num_tokens != num_tokens or self._num_layers != len(cuts):
            held = f"{self.num_tokens} tokens in {self._num_layers} layers"
            raise ProtocolError(f"paths of {held}; the prompt has {num_tokens} tokens, the model {len(cuts)} layers")
        form, wanted = ((p._k, p._weights is not None) for p in (self, others))
        if form != wanted or self._ids.values.itemsize < others._ids.values.itemsize:
            held = f"paths of (columns, weights) {form}, ids of {self._ids.values.dtype}"
            raise ProtocolError(f"{held}; this model's are {wanted}, {others._ids.values.dtype}")
        for start in range(0, num_tokens, _CHECKED_TOKENS):  # padded, so not all at once
            try:
                self.slice(start, min(start + _CHECKED_TOKENS, num_tokens)).check(cuts)
            except ValueError as error:
                raise ProtocolError(str(error)) from error
        if self._weights is not None and not np.isfinite(self._weights.values).all():
            raise ProtocolError("paths: a weight is not finite")
