"""`Expected`: what an engine will ask of a host after the step it has planned. NumPy only.

Shape letters: H steps, L layers, R routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: A chance of 1.
SURE = 255


@dataclass(frozen=True, eq=False)
class Expected:
    """Units of steps that are not planned yet, the first of them number `step`.

    `known_HLR` bool: used in step `step` + h for certain (paths of prompts that wait or are half computed), if the
    engine takes them in as it expects. `likely_LR` uint8: how likely running requests ask for it in any of these steps
    and later ones, from 0 to `SURE`; where steps are chosen by path, how many do. Where units come and go what is known
    is fetched ahead, and what is likely only stays longer. A host whose own all stay loads both into slots that are
    free: units of another one that is lost.
    """

    step: int
    known_HLR: np.ndarray
    likely_LR: np.ndarray

    def check(self, num_layers: int, num_routed: int) -> None:
        """Raise ValueError unless both arrays are of their types and of layers and experts like these."""
        shapes, types = (self.known_HLR.shape[1:], self.likely_LR.shape), (self.known_HLR.dtype, self.likely_LR.dtype)
        if shapes != ((num_layers, num_routed),) * 2 or types != (bool, np.uint8):
            raise ValueError(
                f"expected units of shape {self.known_HLR.shape}; the model has {num_layers}, {num_routed}"
            )
