"""How far steps take what their measured constants say, learned while they run. NumPy only, no clock.

Constants are measured at start, each by itself. In a step loads hide behind work, or wait for it, hosts share cores,
and which units are missing changes while a step runs: a choice by constants alone may save what costs nothing.

A step has four parts (shape letter 4): what it takes anyhow, by its tokens, in its layers if every unit were held, and
what loads of missing ones add to that.
"""

from __future__ import annotations

import numpy as np

#: Of a step's weight this is left one step later: a hundred steps tell.
_KEEP = 0.99
#: Weight of the constants as they were measured, over that of the steps that tell. It is the same for all parts, so one
#: that is small beside the others keeps its factor near 1 rather than take in their noise.
_PRIOR = 0.003
#: A factor is never less than the inverse of this, nor more.
_FACTOR = 20.0
#: A step counts as so often what was expected of it at most: one that stood still for some other reason says little.
_STOOD = 5.0


class StepFit:
    """Least squares, with a ridge, of steps' seconds by their parts. `factors_4`: what each part's seconds by the
    constants are to be multiplied by; whichever is at its bound leaves the others as they were fitted beside it."""

    def __init__(self) -> None:
        self.factors_4 = np.ones(4)
        self._moments_44, self._products_4 = np.zeros((4, 4)), np.zeros(4)

    def add(self, parts_4: np.ndarray, took_s: float) -> None:
        """Take in a step: seconds of its parts by the constants, and what it took."""
        took_s = min(took_s, _STOOD * max(parts_4.sum(), float(self.factors_4 @ parts_4)))
        self._moments_44 = _KEEP * self._moments_44 + np.outer(parts_4, parts_4)
        self._products_4 = _KEEP * self._products_4 + parts_4 * took_s
        ridge = _PRIOR * np.trace(self._moments_44) + 1e-18  # also where every part is 0
        factors_4 = np.linalg.solve(self._moments_44 + ridge * np.eye(4), self._products_4 + ridge)
        self.factors_4 = factors_4.clip(1 / _FACTOR, _FACTOR)
