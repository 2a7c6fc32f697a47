"""`Forecast`: what running requests may ask for after the tokens that are known, learnt from served paths.

In every layer a table says which units follow which from one token to the next; a request's own tokens say what it asks
for lately. NumPy only; what it says depends on the paths it was shown and on their order alone.

Shape letters: N requests, T tokens, L layers, K experts per token, R routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from pregate.router.engine.sequence import Sequence

#: A request's tokens count by so much less for each that came after; the table counts as so many of its tokens, and
#: what is used on average as so many of the table's.
_KEEP, _TABLE_TOKENS, _AVERAGE_TOKENS = 0.95, 8.0, 4.0


@dataclass
class _Lately:
    """A request's tokens, the first `num_tokens` of them: how much the units of each count together, [L, R]; and how
    much all tokens."""

    num_tokens: int
    units_LR: np.ndarray
    weight: float = 0.0


class Forecast:
    """Learns as requests go on (`note`), and says what their next tokens may ask for (`likely`)."""

    def __init__(self, num_layers: int, num_routed: int) -> None:
        self._shape = (num_layers, num_routed)
        self._follows_LRR = np.zeros((num_layers, num_routed, num_routed), dtype=np.float32)
        self._used_LR, self._num_tokens = np.zeros(self._shape, dtype=np.float32), 0
        self._lately: WeakKeyDictionary[Sequence, _Lately] = WeakKeyDictionary()

    def note(self, sequences: Many[Sequence]) -> None:
        """Learn from those tokens of sequences that were not noted yet."""
        for sequence in sequences:
            lately = self._lately.setdefault(sequence, _Lately(0, np.zeros(self._shape, dtype=np.float32)))
            num_new = len(sequence.token_ids) - lately.num_tokens
            if num_new < 1:
                continue
            assert sequence.paths is not None
            before = min(lately.num_tokens, 1)
            used_TLR = self._used(sequence.paths.slice(lately.num_tokens - before, len(sequence.token_ids)).ids)
            first_LTR, then_LTR = used_TLR[:-1].swapaxes(0, 1), used_TLR[1:].swapaxes(0, 1)
            self._follows_LRR += first_LTR.swapaxes(1, 2) @ then_LTR
            new_TLR = used_TLR[before:]
            self._used_LR += new_TLR.sum(axis=0)
            self._num_tokens += num_new
            weight_T = _KEEP ** np.arange(num_new - 1, -1, -1, dtype=np.float32)
            lately.units_LR = lately.units_LR * _KEEP**num_new + np.tensordot(weight_T, new_TLR, axes=1)
            lately.weight = lately.weight * _KEEP**num_new + float(weight_T.sum())
            lately.num_tokens += num_new

    def likely(self, sequences: Many[Sequence]) -> np.ndarray:
        """How likely the next tokens of sequences, all of them noted, visit each unit, [L, R] in 0 to 1."""
        if not sequences:
            return np.zeros(self._shape, dtype=np.float32)
        ids = [s.paths.slice(len(s.token_ids) - 1, len(s.token_ids)).ids for s in sequences if s.paths is not None]
        used_NLR, lately = self._used(np.concatenate(ids)), [self._lately[s] for s in sequences]
        share_LR = self._used_LR / max(1, self._num_tokens)
        # Of a unit's tokens the share that is followed by each unit; of few tokens nearer to the average.
        seen_LR1 = self._used_LR[:, :, None] + _AVERAGE_TOKENS
        table_LRR = (self._follows_LRR + _AVERAGE_TOKENS * share_LR[:, None]) / seen_LR1
        each_NLR = (used_NLR.swapaxes(0, 1) @ table_LRR).swapaxes(0, 1)
        each_NLR /= np.maximum(used_NLR.sum(axis=2, keepdims=True), 1)
        own_NLR = np.stack([one.units_LR for one in lately])
        weight_N11 = np.array([one.weight for one in lately], dtype=np.float32)[:, None, None]
        each_NLR = (own_NLR + _TABLE_TOKENS * each_NLR) / (weight_N11 + _TABLE_TOKENS)
        return 1 - np.prod(1 - each_NLR.clip(0, 1), axis=0)

    def _used(self, ids_TLK: np.ndarray) -> np.ndarray:
        """float32 [T, L, R]: 1 where a token visits a unit."""
        num_layers, num_routed = self._shape
        used_TLR = np.zeros((len(ids_TLK), num_layers, num_routed + 1), dtype=np.float32)  # padding marks the last
        used_TLR[np.arange(len(ids_TLK))[:, None, None], np.arange(num_layers)[None, :, None], ids_TLK] = 1
        return used_TLR[..., :num_routed]
