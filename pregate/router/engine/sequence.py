"""One accepted request on its way: its tokens, how far they are computed, its KV blocks and its paths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pregate.router.link.messages import SamplingParams

if TYPE_CHECKING:
    from pregate.model.paths import Paths


@dataclass
class Sequence:
    """`token_ids` is the prompt and what was generated; the first `num_computed` of them are in the KV cache.

    `paths` has `capacity` rows and holds the path of every known token when paths are exact, else it is None.
    """

    request_id: str
    token_ids: list[int]
    num_prompt: int
    max_tokens: int
    sampling: SamplingParams
    seed: int
    deadline_s: float | None
    pairs_per_host: np.ndarray
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    paths: Paths | None = None

    @property
    def capacity(self) -> int:
        """Tokens this sequence may reach; its KV blocks are reserved for all of them at admission."""
        return self.num_prompt + self.max_tokens

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Known tokens that are not computed yet: the rest of the prompt, or the one last sampled."""
        return len(self.token_ids) - self.num_computed
