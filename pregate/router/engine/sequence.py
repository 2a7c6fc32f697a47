"""One accepted request on its way: its tokens, how far they are computed, its KV blocks and its paths."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pregate.base.completion import TokenLogprob
from pregate.router.link.messages import TOKEN_BYTES, SamplingParams

if TYPE_CHECKING:
    from pregate.model.packed_paths import PackedPaths
    from pregate.router.engine.batching import UnitLayout


@dataclass(eq=False)
class Sequence:
    """`token_ids` is the prompt and what was generated; the first `num_computed` of them are in the KV cache, in the
    blocks of `table`, of which the first `num_published` others may share.

    `end_ids` end it. `prompt_logprobs` fill up while its prompt is computed, where they were asked for. `num_resumed`
    of the generated tokens it came with.

    `paths` has the path of every known token when paths are exact, else it is None; `path_slot` is where the path
    router's state of it lies, which takes `state_bytes`. `arrival` numbers requests in the order they came; it can run,
    and has been passed over, since `ready_s`. `next_rows_U` are the rows that its last token asks of each unit,
    `unit_counts` the hosts' hits, misses and seconds waited before it came. It came at `came_s`, its first step began
    at `begun_s`, and its first token was there at `first_token_s`, by the monotonic clock.
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
    priority: int = 0
    end_ids: frozenset[int] = frozenset()
    repetition_penalty: float = 1.0
    num_computed: int = 0
    table: list[int] = field(default_factory=list)
    num_published: int = 0
    num_resumed: int = 0
    paths: PackedPaths | None = None
    path_slot: int | None = None
    state_bytes: int = 0
    arrival: int = -1
    is_running: bool = False
    ready_s: float = 0.0
    next_rows_U: np.ndarray | None = None
    unit_counts: tuple[int, int, float] = (0, 0, 0.0)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    came_s: float = 0.0
    traceparent: str = ""
    begun_s: float | None = None
    first_token_s: float | None = None
    _chunk_rows: tuple[tuple[int, int], np.ndarray] | None = None

    @property
    def order(self) -> tuple[int, int]:
        """The lowest is served first."""
        return self.priority, self.arrival

    @cached_property
    def _changes_logits(self) -> bool:
        s = self.sampling
        return bool(self.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty or s.logit_bias)

    @property
    def changes_logits(self) -> bool:
        """Whether its next token is not picked from the model's logits as they are."""
        return self._changes_logits or self.num_generated < self.sampling.min_tokens

    def next_rows(self, layout: UnitLayout, most: int) -> np.ndarray:
        """The rows that its pending tokens, at most so many, ask of each unit, uint16 [U]. It must have paths."""
        if self.next_rows_U is not None and len(self.token_ids) - self.num_computed == 1:  # read for all in each step
            return self.next_rows_U
        piece = self.num_computed, min(len(self.token_ids), self.num_computed + most)
        if self._chunk_rows is None or self._chunk_rows[0] != piece:
            assert self.paths is not None
            self._chunk_rows = piece, layout.rows(self.paths.slice(*piece).ids)
        return self._chunk_rows[1]

    def placed(self, was_U: np.ndarray) -> None:
        """Unit u was `was_U[u]` until now."""
        self._chunk_rows = None
        if self.next_rows_U is not None:
            self.next_rows_U = self.next_rows_U[was_U]

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether logprobs of its prompt are asked for and not all known: then its prompt is computed, not found."""
        return self.sampling.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt - 1

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
        """What it holds while it waits, as `SubmitRequest.num_bytes`."""
        return TOKEN_BYTES * len(self.token_ids) + (0 if self.paths is None else self.paths.nbytes + self.state_bytes)
