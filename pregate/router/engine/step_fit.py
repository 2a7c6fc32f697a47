"""How far steps take what their measured constants say, learned while they run. NumPy only, no clock.

Constants are measured at start, each by itself. In a step loads hide behind work, or wait for it, hosts share cores,
and which units are missing is half a second old: a choice by constants alone may save what costs nothing.
"""

from __future__ import annotations

import numpy as np

#: Of a step's weight this is left one step later: a hundred steps tell.
_KEEP = 0.99
#: Weight of the constants as they were measured, over that of the steps that tell.
_PRIOR = 0.01
#: A factor is never less than the inverse of this, nor more; a step that took longer than so often what was expected
#: of it stood still for some other reason.
_FACTOR, _STOOD = 20.0, 5.0


class StepFit:
    """Least squares, with a ridge, of steps' seconds by their parts: what a step takes anyhow, by its tokens, and in
    its layers. `factors`: what each part is to be multiplied by, float64 [3]."""

    def __init__(self) -> None:
        self.factors = np.ones(3)
        self.num_steps = 0
        self._parts, self._seconds = np.zeros((3, 3)), np.zeros(3)

    def add(self, parts: tuple[float, float, float], took_s: float) -> None:
        """Take in a step: seconds of its parts by the constants, and what it took."""
        parts_3 = np.array(parts)
        if took_s > _STOOD * max(parts_3.sum(), self.factors @ parts_3):
            return
        self.num_steps += 1
        self._parts = _KEEP * self._parts + np.outer(parts_3, parts_3)
        self._seconds = _KEEP * self._seconds + parts_3 * took_s
        # By the parts' own sizes: their seconds are orders apart.
        ridge_3 = _PRIOR * np.diag(self._parts) + 1e-18
        factors = np.linalg.solve(self._parts + np.diag(ridge_3), self._seconds + ridge_3)
        self.factors = factors.clip(1 / _FACTOR, _FACTOR)
