"""`Paths`: for every token, the routed experts it visits in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pregate.model.config import LayerCut


@dataclass(frozen=True)
class Paths:
    """Routed expert ids of T tokens in L layers.

    `ids` int16 [T, L, k_max]: ascending in a row, -1 padding at its end (k may vary by layer and token).
    `weights` float32 of the same shape (0 at padding), or None when all are 1. `exact` is False for a forecast.

    Example: ids [[[0, 3], [2, -1]]] sends one token to experts 0 and 3 in layer 0 and to expert 2 in layer 1.
    """

    ids: np.ndarray
    weights: np.ndarray | None = None
    exact: bool = True

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[0]

    @property
    def num_units(self) -> int:
        """How many units all tokens together visit."""
        seen_LR = np.zeros((self.ids.shape[1], int(self.ids.max(initial=0)) + 2), dtype=bool)
        seen_LR[np.arange(self.ids.shape[1])[:, None], self.ids] = True  # -1 is the last column
        return int(seen_LR[:, :-1].sum())

    def check(self, cuts: Sequence[LayerCut]) -> None:
        """Raise ValueError where ids leave their layer's range, are not ascending, or padding is not last."""
        if self.ids.ndim != 3 or self.ids.dtype != np.int16 or self.ids.shape[1] != len(cuts):
            raise ValueError(f"paths: need int16 [T, {len(cuts)}, k], got {self.ids.dtype} {self.ids.shape}")
        limits = np.array([c.num_routed for c in cuts], dtype=np.int16)[None, :, None]
        if (self.ids >= limits).any() or (self.ids < -1).any():
            raise ValueError("paths: an expert id lies outside its layer's routed experts")
        left, right = self.ids[..., :-1], self.ids[..., 1:]
        if ((right >= 0) & ((left < 0) | (left >= right))).any():
            raise ValueError("paths: ids of a row must ascend, with -1 padding at the end")
        if self.weights is not None and self.weights.shape != self.ids.shape:
            raise ValueError(f"paths: weights {self.weights.shape} do not match ids {self.ids.shape}")

    def __getitem__(self, rows: slice) -> Paths:
        weights = None if self.weights is None else self.weights[rows]
        return Paths(self.ids[rows], weights, self.exact)

    @staticmethod
    def concatenate(parts: Sequence[Paths]) -> Paths:
        """Join paths of the same layers token-wise; ValueError unless all or none have weights."""
        weighted = [p.weights for p in parts if p.weights is not None]
        if len(weighted) not in (0, len(parts)):
            raise ValueError(f"paths: {len(weighted)} of {len(parts)} parts have weights; all must or none")
        weights = np.concatenate(weighted) if weighted else None
        return Paths(np.concatenate([p.ids for p in parts]), weights, all(p.exact for p in parts))
