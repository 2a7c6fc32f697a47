"""`Forecast`: what running requests may ask for after the tokens that are known, learnt from served paths.

In every layer a table says which units follow which from one token to the next; a request's own tokens say what it asks
for lately. NumPy only; what it says depends on the paths it was shown and on their order alone.

Shape letters: N requests, P places of requests, T tokens, L layers, K experts per token, R routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from weakref import WeakKeyDictionary, finalize

import numpy as np

from pregate.router.engine.sequence import Sequence

#: A request's tokens count by so much less for each that came after; the table counts as so many of its tokens, and
#: what is used on average as so many of the table's.
_KEEP, _TABLE_TOKENS, _AVERAGE_TOKENS = 0.95, 8.0, 4.0
#: Tokens of a prompt that are laid out at once, as float32 [T, L, R + 1]; and tokens after which all that the tables
#: count is halved: float32 counts one by one up to 2**24, and traffic changes.
_PIECE_TOKENS, _HALVE_TOKENS = 256, 1 << 18


class Forecast:
    """Learns as requests go on (`note`), and says what their next tokens may ask for (`likely`).

    Of each request that lives a place in tables holds what its last token visited, and how much each unit counts of
    what it asked for lately: requests that decode go on together, in a few operations on arrays.
    """

    def __init__(self, num_layers: int, num_routed: int) -> None:
        self._shape = (num_layers, num_routed)
        self._follows_LRR = np.zeros((num_layers, num_routed, num_routed), dtype=np.float32)
        self._used_LR, self._num_tokens = np.zeros(self._shape, dtype=np.float32), 0.0
        self._last_PLR, self._lately_PLR = (np.zeros((0, *self._shape), dtype=np.float32) for _ in range(2))
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
            last_NLR, then_NLR = self._last_PLR[going_on], self._used(np.concatenate(ids))
            self._follow(last_NLR, then_NLR)
            self._last_PLR[going_on] = then_NLR
            self._lately_PLR[going_on] = self._lately_PLR[going_on] * _KEEP + then_NLR
            self._weight_P[going_on] = self._weight_P[going_on] * _KEEP + 1

    def likely(self, sequences: Many[Sequence]) -> np.ndarray:
        """How likely the next tokens of sequences, all of them noted, visit each unit, [L, R] in 0 to 1."""
        if not sequences:
            return np.zeros(self._shape, dtype=np.float32)
        places = [self._noted[sequence][0] for sequence in sequences]
        last_NLR, weight_N11 = self._last_PLR[places], self._weight_P[places, None, None]
        share_LR = self._used_LR / max(1, self._num_tokens)
        # Of a unit's tokens the share that is followed by each unit; of few tokens nearer to the average.
        table_LRR = self._follows_LRR + _AVERAGE_TOKENS * share_LR[:, None]
        table_LRR /= self._used_LR[:, :, None] + _AVERAGE_TOKENS
        each_NLR = (last_NLR.swapaxes(0, 1) @ table_LRR).swapaxes(0, 1)
        each_NLR *= _TABLE_TOKENS / np.maximum(last_NLR.sum(axis=2, keepdims=True), 1)
        each_NLR = (each_NLR + self._lately_PLR[places]) / (weight_N11 + _TABLE_TOKENS)
        return 1 - np.prod(1 - each_NLR.clip(0, 1), axis=0)

    def _note_many(self, sequence: Sequence, noted: tuple[int, int] | None) -> None:
        """Learn from a prompt, or from several tokens at once."""
        place, num_noted = self._place(sequence) if noted is None else noted
        num_tokens = len(sequence.token_ids)
        assert sequence.paths is not None
        for start in range(num_noted, num_tokens, _PIECE_TOKENS):
            stop = min(num_tokens, start + _PIECE_TOKENS)
            self._note_piece(place, start, self._used(sequence.paths.slice(start, stop).ids))
        self._noted[sequence] = place, num_tokens

    def _note_piece(self, place: int, start: int, new_TLR: np.ndarray) -> None:
        """Learn from the tokens from `start` on of the sequence that has this place."""
        before_TLR = self._last_PLR[place : place + 1] if start else new_TLR[:0]
        used_TLR = np.concatenate([before_TLR, new_TLR])
        self._follow(used_TLR[:-1], used_TLR[1:])
        if not start:
            self._used_LR += new_TLR[0]
            self._num_tokens += 1
        kept_T = _KEEP ** np.arange(len(new_TLR), -1, -1, dtype=np.float32)
        self._last_PLR[place] = new_TLR[-1]
        self._lately_PLR[place] = self._lately_PLR[place] * kept_T[0] + np.tensordot(kept_T[1:], new_TLR, axes=1)
        self._weight_P[place] = self._weight_P[place] * kept_T[0] + kept_T[1:].sum()

    def _follow(self, first_TLR: np.ndarray, then_TLR: np.ndarray) -> None:
        """Count tokens, and what came before each."""
        self._follows_LRR += first_TLR.transpose(1, 2, 0) @ then_TLR.swapaxes(0, 1)
        self._used_LR += then_TLR.sum(axis=0)
        self._num_tokens += len(then_TLR)
        if self._num_tokens > _HALVE_TOKENS:
            self._follows_LRR /= 2
            self._used_LR /= 2
            self._num_tokens /= 2

    def _place(self, sequence: Sequence) -> tuple[int, int]:
        """A place of its own until the sequence is forgotten, and that nothing of it is noted."""
        if not self._free:
            size = len(self._weight_P)
            more = max(16, size)
            tables = [np.zeros((more, *self._shape), dtype=np.float32) for _ in range(2)]
            self._last_PLR = np.concatenate([self._last_PLR, tables[0]])
            self._lately_PLR = np.concatenate([self._lately_PLR, tables[1]])
            self._weight_P = np.concatenate([self._weight_P, np.zeros(more, dtype=np.float32)])
            self._free += range(size, size + more)
        place = self._free.pop()
        self._last_PLR[place] = self._lately_PLR[place] = self._weight_P[place] = 0
        finalize(sequence, self._free.append, place)
        return place, 0

    def _used(self, ids_TLK: np.ndarray) -> np.ndarray:
        """float32 [T, L, R]: 1 where a token visits a unit."""
        num_layers, num_routed = self._shape
        used_TLR = np.zeros((len(ids_TLK), num_layers, num_routed + 1), dtype=np.float32)  # padding marks the last
        used_TLR[np.arange(len(ids_TLK))[:, None, None], np.arange(num_layers)[None, :, None], ids_TLK] = 1
        return used_TLR[..., :num_routed]
