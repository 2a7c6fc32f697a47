"""One accepted request on its way: its tokens, how far they are computed, its KV blocks and its paths."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pregate.router.link.messages import SamplingParams

if TYPE_CHECKING:
    from pregate.model.packed_paths import PackedPaths


@dataclass(eq=False)
class Sequence:
    """`token_ids` is the prompt and what was generated; the first `num_computed` of them are in the KV cache, in the
    blocks of `table`, of which the first `num_published` others may share.

    `paths` has the path of every known token when paths are exact, else it is None; `path_slot` is where the path
    router's state of it lies. `arrival` numbers requests in the order they came.
    """

    request_id: str
    token_ids: list[int]
    num_prompt: int
    max_tokens: int
    sampling: SamplingParams
    seed: int
    deadline_s: float | None
    pairs_per_host: np.ndarray
    salt: str = ""
    num_computed: int = 0
    table: list[int] = field(default_factory=list)
    num_published: int = 0
    paths: PackedPaths | None = None
    path_slot: int | None = None
    arrival: int = -1

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end it, besides the model's own."""
        return frozenset(self.sampling.stop_token_ids)

    @property
    def capacity(self) -> int:
        """Tokens this sequence may reach."""
        return self.num_prompt + self.max_tokens

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Known tokens that are not computed yet: the rest of the prompt, or the one last sampled."""
        return len(self.token_ids) - self.num_computed

    @property
    def waiting_bytes(self) -> int:
        """What it holds while it waits: its tokens and their paths."""
        return 8 * len(self.token_ids) + (0 if self.paths is None else self.paths.nbytes)
