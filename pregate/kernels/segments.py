"""Expert-sorted order, offsets, inverse and tile lists: for all layers of a step in one pass, before layer 0.

Buffers have sizes that depend on shapes only, counts are data: a device can fill and read them without the host
(`triton_segments.py` builds the same arrays in one launch). All int32.

Shape letters: T tokens, L layers, K experts per token, J = shared + K columns, E = shared + routed units,
P = T * J rows at most, X tiles at most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from pregate.base.device import to_device


@dataclass(frozen=True, eq=False, kw_only=True)
class _Rows:
    """What `Segment` and `Segments` share."""

    num_shared: int
    block_m: int
    row_token: torch.Tensor
    row_pair: torch.Tensor
    row_of: torch.Tensor
    offsets: torch.Tensor
    tiles: torch.Tensor
    num_tiles: torch.Tensor
    row_weight: torch.Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment(_Rows):
    """One layer: rows sorted by unit, within a unit by token. Units 0 .. num_shared - 1 are shared, then the routed.

    `row_token` [P] token of each row; `row_pair` [P] its place t * J + j; `row_of` [T, J] row of each place, -1 for
    none; `offsets` [E + 1] where each unit's rows begin; `tiles` [X, 3] unit, first row, end row; `num_tiles` [1].
    `ids_TK` [T, K] as they came, `row_weight` fp32 [P] and `weights_TK` fp32 when experts have weights other than 1.
    Rows and tiles past the counts are 0 and mean nothing.
    """

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.row_of.shape[0]

    @property
    def num_units(self) -> int:
        return self.offsets.shape[0] - 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Segments(_Rows):
    """All layers of a step: the arrays of `Segment` with a leading L (`ids` and `weights` [T, L, K]).

    `bad_ids` int32 [L]: how many ids of each layer are no expert, where a device sorted them; see `check_ids`.
    """

    ids_TLK: torch.Tensor
    weights_TLK: torch.Tensor | None = None
    bad_ids: torch.Tensor | None = None

    @cached_property
    def _ids_by_layer(self) -> torch.Tensor:
        """One copy for all layers: a copy in every layer would be a launch in every layer."""
        return self.ids_TLK.transpose(0, 1).contiguous()

    @cached_property
    def _weights_by_layer(self) -> torch.Tensor | None:
        return None if self.weights_TLK is None else self.weights_TLK.transpose(0, 1).contiguous()

    def layer(self, layer: int) -> Segment:
        """Return views of one layer's arrays."""
        arrays = {name: getattr(self, name)[layer] for name in _BUFFERS[:-1]}
        return Segment(
            num_shared=self.num_shared,
            block_m=self.block_m,
            **arrays,
            num_tiles=self.num_tiles[layer : layer + 1],
            ids_TK=self._ids_by_layer[layer],
            row_weight=None if self.row_weight is None else self.row_weight[layer],
            weights_TK=None if self._weights_by_layer is None else self._weights_by_layer[layer],
        )

    def check_ids(self) -> None:
        """ValueError if ids that a device sorted lie outside [-1, num_routed), as `build` raises at once.

        It waits for the device, so it is for the moment when the step's other results are read: outside a CUDA graph,
        after each replay. Unread, such ids are not silent either: their tokens come out as NaN.
        """
        if self.bad_ids is None:
            return
        counts = self.bad_ids.tolist()
        if any(counts):
            bad = {layer: count for layer, count in enumerate(counts) if count}
            num_routed = self.offsets.shape[1] - 1 - self.num_shared
            raise ValueError(f"expert ids must lie in [-1, {num_routed}); others, by layer: {bad}")

    def to(self, device: torch.device) -> Segments:
        """Return these segments on `device`: themselves if they are there, else a copy whose buffers travel as one
        array, without waiting for it."""
        here = self.row_token.device
        if here.type == device.type and device.index in (None, here.index):
            return self
        parts = [getattr(self, name) for name in (*_BUFFERS, "ids_TLK")]
        flat = torch.cat([part.reshape(-1) for part in parts])
        pieces = to_device(flat, device).split([part.numel() for part in parts])
        moved = {n: p.view(o.shape) for n, p, o in zip((*_BUFFERS, "ids_TLK"), pieces, parts, strict=True)}
        rest = {n: None if (part := getattr(self, n)) is None else part.to(device) for n in _OPTIONAL}
        return replace(self, **moved, **rest)


_OPTIONAL = ("row_weight", "weights_TLK", "bad_ids")
_BUFFERS = ("row_token", "row_pair", "row_of", "offsets", "tiles", "num_tiles")


def max_tiles(num_rows: int, num_units: int, block_m: int) -> int:
    """The most tiles that `num_rows` rows over `num_units` units can need: every unit may end in a short one."""
    return min(num_rows, num_rows // block_m + num_units)


def build(
    ids_TLK: torch.Tensor,
    num_routed: int,
    *,
    num_shared: int = 0,
    block_m: int = 64,
    weights_TLK: torch.Tensor | None = None,
) -> Segments:
    """Sort a step's rows by unit in every layer at once. `ids_TLK` of any integer type, -1 for no expert, anywhere.

    ValueError for an id outside [-1, num_routed).

    Example: T = 3, L = 1, K = 2, one shared unit, ids [[0, 1], [1, -1], [-1, 0]], 2 routed, block_m 2. Places t * 3 + j
    hold units [0 1 2 | 0 2 - | 0 - 1]. Then row_pair = [0 3 6 1 8 2 4 ...], row_token = [0 1 2 0 2 0 1 ...],
    row_of = [[0 3 5] [1 6 -1] [2 -1 4]], offsets = [0 3 5 7],
    tiles = [[0 0 2] [0 2 3] [1 3 5] [2 5 7]], num_tiles = 4.
    """
    units_LP = _units(ids_TLK, num_routed, num_shared)
    num_tokens, num_layers, num_k = ids_TLK.shape
    num_units, num_columns = num_shared + num_routed, num_shared + num_k
    num_rows = units_LP.shape[1]
    # 16-bit keys make NumPy's stable sort a radix sort.
    order_LP = np.argsort(units_LP, axis=1, kind="stable").astype(np.int32)
    layers_L1 = np.arange(num_layers)[:, None]
    keys = (units_LP + layers_L1 * (num_units + 1)).reshape(-1)
    counts_LE = np.bincount(keys, minlength=num_layers * (num_units + 1)).reshape(num_layers, -1)[:, :num_units]
    offsets = np.zeros((num_layers, num_units + 1), dtype=np.int32)
    np.cumsum(counts_LE, axis=1, out=offsets[:, 1:])
    real_LP = np.arange(num_rows) < offsets[:, -1:]
    row_of = np.full((num_layers, num_rows), -1, dtype=np.int32)
    np.put_along_axis(row_of, order_LP, np.where(real_LP, np.arange(num_rows, dtype=np.int32), -1), axis=1)
    order_LP[~real_LP] = 0
    tiles, num_tiles = _tiles(counts_LE, offsets, block_m, max_tiles(num_rows, num_units, block_m))
    built = Segments(
        num_shared=num_shared,
        block_m=block_m,
        row_token=torch.from_numpy(order_LP // max(num_columns, 1)),
        row_pair=torch.from_numpy(order_LP),
        row_of=torch.from_numpy(row_of.reshape(num_layers, num_tokens, num_columns)),
        offsets=torch.from_numpy(offsets),
        tiles=torch.from_numpy(tiles),
        num_tiles=torch.from_numpy(num_tiles),
        ids_TLK=ids_TLK.to(torch.int32),
    )
    return built if weights_TLK is None else with_weights(built, weights_TLK)


def with_weights(segments: Segments, weights_TLK: torch.Tensor) -> Segments:
    """Return `segments` with routing weights in row order as well; shared units have weight 1."""
    weights_LTK = weights_TLK.to(torch.float32).transpose(0, 1)
    ones = weights_LTK.new_ones(*weights_LTK.shape[:2], segments.num_shared)
    weights_LP = torch.cat([ones, weights_LTK], dim=2).flatten(1)
    row_weight = weights_LP.gather(1, segments.row_pair.long())
    return replace(segments, row_weight=row_weight, weights_TLK=weights_TLK.to(torch.float32))


def tile_list(counts: np.ndarray, block_m: int) -> np.ndarray:
    """Return int32 [tiles, 3] for units with `counts` rows each, laid end to end.

    Example: counts [3, 0, 1], block_m 2: [[0, 0, 2], [0, 2, 3], [2, 3, 4]].
    """
    ends = np.cumsum(counts)
    tiles, num_tiles = _tiles(counts[None], np.concatenate(([0], ends))[None], block_m, max(int(ends[-1]), 1))
    return tiles[0, : num_tiles[0]]


def _units(ids_TLK: torch.Tensor, num_routed: int, num_shared: int) -> np.ndarray:
    """Unit of every place, int16 [L, P]; the number of units where there is none."""
    ids_LTK = ids_TLK.cpu().numpy().transpose(1, 0, 2)
    if ids_LTK.size and (ids_LTK.min() < -1 or ids_LTK.max() >= num_routed):
        raise ValueError(f"expert ids must lie in [-1, {num_routed}), got {ids_LTK.min()} to {ids_LTK.max()}")
    num_layers, num_tokens, num_k = ids_LTK.shape
    units = np.empty((num_layers, num_tokens, num_shared + num_k), dtype=np.int16)
    units[:, :, :num_shared] = np.arange(num_shared)
    units[:, :, num_shared:] = np.where(ids_LTK < 0, num_routed, ids_LTK) + num_shared
    return units.reshape(num_layers, -1)


def _tiles(counts_LE: np.ndarray, offsets: np.ndarray, block_m: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tile lists int32 [L, size, 3] and their lengths [L]."""
    num_layers = counts_LE.shape[0]
    per_unit_LE = -(-counts_LE // block_m)
    num_tiles = per_unit_LE.sum(axis=1).astype(np.int32)
    layer, unit = np.divmod(np.repeat(np.arange(per_unit_LE.size), per_unit_LE.reshape(-1)), counts_LE.shape[1])
    place = np.arange(len(layer)) - (np.cumsum(num_tiles) - num_tiles)[layer]
    first_tile = np.cumsum(per_unit_LE, axis=1) - per_unit_LE
    first = offsets[layer, unit] + (place - first_tile[layer, unit]) * block_m
    tiles = np.zeros((num_layers, size, 3), dtype=np.int32)
    tiles[layer, place] = np.stack([unit, first, np.minimum(first + block_m, offsets[layer, unit + 1])], axis=1)
    return tiles, num_tiles
