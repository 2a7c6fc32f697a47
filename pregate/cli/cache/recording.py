"""`Recording`: which units the steps of an engine used, and what was known of them before.

Shape letters: S steps, H steps ahead, L layers, R routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from pregate.base.errors import UserError
from pregate.workers.link.expected import Expected


@dataclass(frozen=True, eq=False)
class Recording:
    """bool `used_SLR`: what each step used. When it was planned, its engine expected `known_SHLR` of the steps after it
    for certain and uint8 `likely_SLR` of all of them (`Expected`). `tokens_S` says how many tokens each step had,
    `unit_bytes` how many bytes a unit has."""

    used_SLR: np.ndarray
    known_SHLR: np.ndarray
    likely_SLR: np.ndarray
    tokens_S: np.ndarray
    unit_bytes: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.used_SLR)

    def expected(self, step: int) -> Expected:
        """What was expected after step `step`."""
        return Expected(step + 1, self.known_SHLR[step], self.likely_SLR[step])

    def first(self, num_steps: int) -> Recording:
        """The first steps of it."""
        part = slice(0, num_steps)
        used_SLR, known_SHLR, likely_SLR = self.used_SLR[part], self.known_SHLR[part], self.likely_SLR[part]
        return Recording(used_SLR, known_SHLR, likely_SLR, self.tokens_S[part], self.unit_bytes)

    def one_index(self) -> Recording:
        """The same with layer 0 for all: whole experts, where one index holds for every layer."""
        first, num_bytes = slice(0, 1), self.unit_bytes * self.used_SLR.shape[1]
        known_SHLR, likely_SLR = self.known_SHLR[:, :, first], self.likely_SLR[:, first]
        return Recording(self.used_SLR[:, first], known_SHLR, likely_SLR, self.tokens_S, num_bytes)

    def save(self, path: Path) -> None:
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        shapes = {f"{name}_shape": np.array(array.shape) for name, array in arrays.items() if array.dtype == bool}
        bits = {name: np.packbits(a) if a.dtype == bool else a for name, a in arrays.items()}
        np.savez_compressed(path, allow_pickle=False, **bits, **shapes)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Undo `save`; UserError for a file that is no recording."""
        try:
            with np.load(path, allow_pickle=False) as held:
                found = {}
                for name in (f.name for f in fields(cls)):
                    array = held[name]
                    if (shape := held.get(f"{name}_shape")) is not None:
                        array = np.unpackbits(array, count=int(np.prod(shape))).astype(bool).reshape(shape)
                    found[name] = array
        except (OSError, ValueError, KeyError) as error:
            raise UserError.of("--recording", path, f"is not a recording of steps ({error})") from error
        return cls(**found)
