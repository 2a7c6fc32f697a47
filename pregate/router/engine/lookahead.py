"""What the steps after the next will use: paths of prompts that wait or are half computed are known, what running
requests ask for is forecast from what they and others did (`forecast.py`). NumPy only; no torch, no clock.

Shape letters: T tokens, H steps, L layers, K experts per token, R routed experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from pregate.router.engine.forecast import Forecast
from pregate.router.engine.sequence import Sequence
from pregate.workers.link.protocol import SURE, Expected

if TYPE_CHECKING:
    from pregate.model.config import LayerCut
    from pregate.model.paths import Paths
    from pregate.router.engine.batching import UnitLayout

#: Steps that are looked ahead: prompts that are taken in later are not expected yet.
HORIZON = 8
#: Where steps are chosen by path a unit that so many ask for counts as half certain.
_HALF_SURE = 8.0


def used_units(ids_TLK: np.ndarray, num_routed: int) -> np.ndarray:
    """Return bool [L, R]: the units that these paths visit. Example: ids [[[0, 2], [1, -1]]] and 3 experts give
    [[1, 0, 1], [0, 1, 0]]."""
    num_layers = ids_TLK.shape[1]
    used = np.zeros((num_layers, num_routed + 1), dtype=bool)  # padding marks the last column
    used[np.arange(num_layers)[:, None], ids_TLK] = True
    return used[:, :num_routed]


def rest_of_step(step: int, ids: Mapping[int, np.ndarray], cuts: Many[LayerCut]) -> Expected:
    """What step `step`, which runs, will ask for in layers to come; `ids` [T, K] of each. Nothing is said of others."""
    known_LR = np.zeros((len(cuts), max(cut.num_routed for cut in cuts)), dtype=bool)
    for layer, ids_TK in ids.items():
        known_LR[layer, ids_TK[ids_TK >= 0]] = True
    return Expected(step, known_LR[None], np.zeros(known_LR.shape, dtype=np.uint8))


class Lookahead:
    """Looks ahead for steps of up to `step_tokens` tokens, as the scheduler fills them: first come, first served
    (`expect`), or by path (`demand`)."""

    def __init__(self, cuts: Many[LayerCut], step_tokens: int, horizon: int = HORIZON) -> None:
        self._shape = (len(cuts), max(cut.num_routed for cut in cuts))
        self._step_tokens, self._horizon, self._forecast = step_tokens, horizon, Forecast(*self._shape)
        self._likely_LR = np.zeros(self._shape, dtype=np.uint8)
        self._used: WeakKeyDictionary[Sequence, dict[tuple[int, int], np.ndarray]] = WeakKeyDictionary()

    def expect(
        self,
        step: int,
        running: Iterable[Sequence],
        waiting: Iterable[Sequence],
        planned: Mapping[Sequence, int],
        forecast: bool = True,
    ) -> Expected:
        """Return what is expected of step `step` and those after it, once `planned` tokens of sequences have run.
        Without `forecast` what is likely is what it was the last time.

        Sequences must have paths; those that run come in their order, then those that wait.
        """
        known_HLR = np.zeros((self._horizon, *self._shape), dtype=bool)
        left, decoding = deque[tuple[Sequence, int]](), list[Sequence]()
        for sequence in (*running, *waiting):
            start = sequence.num_computed + planned.get(sequence, 0)
            if start < len(sequence.token_ids):
                left.append((sequence, start))
            else:
                decoding.append(sequence)
        for known_LR in known_HLR:
            budget = self._step_tokens - len(decoding)
            while left and budget > 0:
                sequence, start = left.popleft()
                stop = min(len(sequence.token_ids), start + budget)
                np.logical_or(known_LR, self._units(sequence, start, stop), out=known_LR)
                budget -= stop - start
                if stop < len(sequence.token_ids):
                    left.appendleft((sequence, stop))
                else:
                    decoding.append(sequence)
        if forecast:
            self._forecast.note(decoding)
            self._likely_LR = np.rint(SURE * self._forecast.likely(decoding)).astype(np.uint8)
        return Expected(step, known_HLR, self._likely_LR)

    def demand(
        self, step: int, running: Iterable[Sequence], planned: Mapping[Sequence, int], layout: UnitLayout
    ) -> Expected:
        """As `expect`, where steps are chosen by path: nobody knows who comes next. A unit is the likelier the more of
        those who run ask for it: for certain with their next pieces, where those do not run in `planned`, else as is
        forecast. So hosts keep what most wait for, the same experts in all layers where all layers have one index."""
        num_LR, decoding = np.zeros(self._shape, dtype=np.float32), list[Sequence]()
        waiting: list[np.ndarray] = []
        for sequence in running:
            start, known = sequence.num_computed + planned.get(sequence, 0), len(sequence.token_ids)
            if start == known:
                decoding.append(sequence)
            elif start == known - 1 and sequence.next_rows_U is not None:
                waiting.append(sequence.next_rows_U)
            else:
                num_LR += self._units(sequence, start, min(known, start + self._step_tokens))
        if waiting:
            num_LR += layout.by_layer(np.stack(waiting).sum(axis=0, dtype=np.int64))
        self._forecast.note(decoding)
        num_LR += self._forecast.rows(decoding)
        self._likely_LR = np.ceil(SURE * (num_LR / (num_LR + _HALF_SURE))).astype(np.uint8)
        return Expected(step, np.zeros((0, *self._shape), dtype=bool), self._likely_LR)

    def before(self, expected: Expected, paths: Paths) -> Expected:
        """Return what is expected from one step earlier on, in which tokens are expected to take these paths."""
        first_1LR = used_units(paths.ids, self._shape[1])[None]
        return Expected(expected.step - 1, np.concatenate([first_1LR, expected.known_HLR]), expected.likely_LR)

    def _units(self, sequence: Sequence, start: int, stop: int) -> np.ndarray:
        """Units of a sequence's tokens; kept while it lives, for a queue is looked through in every step."""
        assert sequence.paths is not None
        known = self._used.setdefault(sequence, {})
        if (start, stop) not in known:
            for other in [span for span in known if span[1] <= sequence.num_computed]:
                del known[other]
            known[start, stop] = used_units(sequence.paths.slice(start, stop).ids, self._shape[1])
        return known[start, stop]
