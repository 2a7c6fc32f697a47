"""`StepCounts`: what all steps of an engine did so far.

Shape letters: T tokens, H hosts.
"""

from __future__ import annotations

import numpy as np

from pregate.model.paths import Paths


class StepCounts:
    """Steps begun, their tokens, units (where paths are exact) and seconds, and the pairs that each host computed."""

    def __init__(self, num_hosts: int) -> None:
        self.num_steps = self.num_tokens = self.num_units = 0
        self.seconds_s, self.pairs_H = 0.0, np.zeros(num_hosts, dtype=np.int64)

    def add(self, pairs_TH: np.ndarray, paths: Paths | None) -> None:
        """Count what a step computed."""
        self.num_tokens += len(pairs_TH)
        self.pairs_H = with_pairs(self.pairs_H, pairs_TH)
        if paths is not None:
            self.num_units += paths.num_units


def with_pairs(sum_H: np.ndarray, pairs_TH: np.ndarray) -> np.ndarray:
    """Add a step's pairs to those of each host, of which there may be more now, or fewer."""
    added_H = np.zeros(max(len(sum_H), pairs_TH.shape[1]), dtype=np.int64)
    added_H[: len(sum_H)] = sum_H
    added_H[: pairs_TH.shape[1]] += pairs_TH.sum(axis=0)
    return added_H
