"""`LastPaths`: where tokens of the requests that ended last went, for who watches. No text and no token ids."""

from __future__ import annotations

import time
from typing import Any

from pregate.router.engine.sequence import Sequence

#: How many requests are kept, and how many of the last tokens of each: fewer, where their ids take more bytes.
NUM_REQUESTS, NUM_TOKENS, _MOST_BYTES = 4, 32, 64 << 10


class LastPaths:
    """`told` is of each such request, the oldest first and in plain types: `ids` int16 little-endian of `shape`
    (tokens, layers, k), -1 padding at the end of a row, of its tokens from number `first` on; how many tokens it had;
    whose it was (`salt`); when it ended, in Unix time. It is replaced and never changed, so any thread may read it."""

    def __init__(self) -> None:
        self.told: tuple[dict[str, Any], ...] = ()

    def add(self, sequence: Sequence) -> None:
        """Note a request that has ended. One that never ran, or has no paths, is passed over."""
        if sequence.paths is None or sequence.begun_s is None:
            return
        stop = sequence.paths.num_tokens
        ids_TLK = sequence.paths.slice(max(0, stop - NUM_TOKENS), stop).ids
        ids_TLK = ids_TLK[-max(1, _MOST_BYTES // max(1, ids_TLK[0].nbytes)) :]
        ended = {
            "ids": ids_TLK.astype("<i2", copy=False).tobytes(),
            "shape": ids_TLK.shape,
            "first": stop - len(ids_TLK),
            "prompt_tokens": sequence.num_prompt,
            "completion_tokens": sequence.num_generated,
            "salt": sequence.salt,
            "ended_s": time.time(),
        }
        self.told = (*self.told[1 - NUM_REQUESTS :], ended)
