"""`Forecast`: what running requests may ask for after the tokens that are known, learnt from served paths.

In every layer a table says which units follow which from one token to the next; a request's own tokens say what it asks
for lately. What it says depends on the paths it was shown and on their order alone; its loops are compiled
(`forecast_loops.py`).

Shape letters: N requests, P places of requests, T tokens, L layers, K experts per token, R routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from weakref import WeakKeyDictionary, finalize

import numpy as np

from pregate.router.engine.forecast_loops import chances, note
from pregate.router.engine.sequence import Sequence

#: A request's tokens count by so much less for each that came after; the table counts as so many of its tokens, and
#: what is used on average as so many of the table's.
_KEEP, _TABLE_TOKENS, _AVERAGE_TOKENS = 0.95, 8.0, 4.0
#: Tokens of a prompt that are noted at once; and tokens after which all that the tables count is halved: float32 counts
#: one by one up to 2**24, and traffic changes.
_PIECE_TOKENS, _HALVE_TOKENS = 256, 1 << 18


class Forecast:
    """Learns as requests go on (`note`), and says what their next tokens may ask for (`likely`, `rows`).

    Of each request that lives a place in tables holds what its last token visited, and how much each unit counts of
    what it asked for lately: requests that decode go on together, in one call.
    """

    def __init__(self, num_layers: int, num_routed: int) -> None:
        self._shape = (num_layers, num_routed)
        self._follows_LRR = np.zeros((num_layers, num_routed, num_routed), dtype=np.float32)
        self._used_LR, self._num_tokens = np.zeros(self._shape, dtype=np.float32), 0.0
        self._last_PLK, self._lately_PLR = np.zeros((0, 0, 0), dtype=np.int16), np.zeros((0, *self._shape), np.float32)
        self._weight_P, self._free = np.zeros(0, dtype=np.float32), list[int]()
        #: Of each request its place, and how many of its tokens were noted.
        self._noted: WeakKeyDictionary[Sequence, tuple[int, int]] = WeakKeyDictionary()

    def note(self, sequences: Many[Sequence]) -> None:
        """Learn from those tokens of sequences that were not noted yet."""
        going_on: list[int] = []
        ids: list[np.ndarray] = []
        for sequence in sequences:
            num_tokens, noted = len(sequence.token_ids), self._noted.get(sequence)
            if noted is not None and noted[1] == num_tokens:
                continue
            assert sequence.paths is not None
            if noted is None or noted[1] + 1 < num_tokens:
                self._note_many(sequence, noted)
                continue
            going_on.append(noted[0])
            ids.append(sequence.paths.slice(num_tokens - 1, num_tokens).ids)
            self._noted[sequence] = noted[0], num_tokens
        if going_on:
            self._note(np.concatenate(ids), going_on)

    def likely(self, sequences: Many[Sequence]) -> np.ndarray:
        """How likely the next tokens of sequences, all of them noted, visit each unit, [L, R] in 0 to 1."""
        return 1 - self._chances(sequences)[0]

    def rows(self, sequences: Many[Sequence]) -> np.ndarray:
        """How many of these next tokens are expected to visit each unit [L, R]."""
        return self._chances(sequences)[1]

    def _chances(self, sequences: Many[Sequence]) -> tuple[np.ndarray, np.ndarray]:
        none_LR, rows_LR = np.ones(self._shape, dtype=np.float32), np.zeros(self._shape, dtype=np.float32)
        if not sequences:
            return none_LR, rows_LR
        places = [self._noted[sequence][0] for sequence in sequences]
        share_LR = self._used_LR / np.float32(max(1, self._num_tokens))
        weights = np.float32(_TABLE_TOKENS), np.float32(_AVERAGE_TOKENS)
        chances(np.array(places), *weights, share_LR, *self._tables, none_LR, rows_LR)
        return none_LR, rows_LR

    @property
    def _tables(self) -> tuple[np.ndarray, ...]:
        return self._follows_LRR, self._used_LR, self._last_PLK, self._lately_PLR, self._weight_P

    def _note_many(self, sequence: Sequence, noted: tuple[int, int] | None) -> None:
        """Learn from a prompt, or from several tokens at once."""
        assert sequence.paths is not None
        num_tokens = len(sequence.token_ids)
        place, num_noted = self._place(sequence) if noted is None else noted
        for start in range(num_noted, num_tokens, _PIECE_TOKENS):
            ids = sequence.paths.slice(start, min(num_tokens, start + _PIECE_TOKENS)).ids
            self._note(ids, [place] * len(ids))
        self._noted[sequence] = place, num_tokens

    def _note(self, ids_TLK: np.ndarray, places: list[int]) -> None:
        """Learn from the next tokens of the sequences that have these places."""
        note(np.ascontiguousarray(ids_TLK), np.array(places), np.float32(_KEEP), *self._tables)
        self._num_tokens += len(places)
        if self._num_tokens > _HALVE_TOKENS:
            self._follows_LRR /= 2
            self._used_LR /= 2
            self._num_tokens /= 2

    def _place(self, sequence: Sequence) -> tuple[int, int]:
        """A place of its own until the sequence is forgotten, and that nothing of it is noted."""
        if not self._free:
            size = len(self._weight_P)
            more = max(16, size)
            assert sequence.paths is not None
            shape = sequence.paths.slice(0, 0).ids.shape[1:]
            if not size:
                self._last_PLK = np.zeros((0, *shape), dtype=np.int16)
            self._last_PLK = np.concatenate([self._last_PLK, np.zeros((more, *shape), dtype=np.int16)])
            self._lately_PLR = np.concatenate([self._lately_PLR, np.zeros((more, *self._shape), dtype=np.float32)])
            self._weight_P = np.concatenate([self._weight_P, np.zeros(more, dtype=np.float32)])
            self._free += range(size, size + more)
        place = self._free.pop()
        self._last_PLK[place], self._lately_PLR[place], self._weight_P[place] = -1, 0, 0
        finalize(sequence, self._free.append, place)
        return place, 0
