"""How much each unit is used, as engines count rows: what placing goes by while a deployment serves. Pure NumPy.

Letters: L layers, R the largest number of routed experts in a layer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: What was counted before counts this much at each look.
KEPT = 0.7
#: Rows a unit, on average, below which use is not known.
LEAST_ROWS = 20


class UnitLoad:
    """Rows of each unit lately: each look's, and of those before less and less."""

    def __init__(self, num_units: int) -> None:
        self._num_units = num_units
        self._seen_LR: NDArray[np.int64] | None = None
        self._load_LR: NDArray[np.float64] | None = None

    def take(self, rows_LR: NDArray[np.int64]) -> None:
        """Take in what all engines have counted since they began; one that began anew starts from nothing."""
        seen_LR, self._seen_LR = self._seen_LR, rows_LR
        if seen_LR is None or (rows_LR < seen_LR).any():
            return
        before_LR = np.zeros(rows_LR.shape) if self._load_LR is None else self._load_LR
        self._load_LR = KEPT * before_LR + (rows_LR - seen_LR)

    @property
    def load_LR(self) -> NDArray[np.float64] | None:  # noqa: N802
        """None while too little was asked to say."""
        load_LR = self._load_LR
        return None if load_LR is None or load_LR.sum() < LEAST_ROWS * self._num_units else load_LR
