"""Which tokens run next: first come, first served, decodes and prompt chunks mixed. No torch, no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pregate.base.errors import QueueFullError
from pregate.router.engine.blocks import BlockAllocator
from pregate.router.engine.sequence import Sequence


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of the queue and of one step. `step_tokens` counts decode tokens and prompt tokens together."""

    max_running: int
    max_queued: int
    step_tokens: int


@dataclass(frozen=True)
class Slice:
    """The next `num_tokens` pending tokens of a sequence."""

    sequence: Sequence
    num_tokens: int

    @property
    def stop(self) -> int:
        return self.sequence.num_computed + self.num_tokens

    @property
    def samples(self) -> bool:
        """True when the slice ends at the last known token, so that its logits give the next one."""
        return self.stop == len(self.sequence.token_ids)


class Batcher:
    """Owns the queue and the running set. A sequence gets all its KV blocks when it is admitted."""

    def __init__(self, limits: BatchLimits, allocator: BlockAllocator) -> None:
        self.limits, self.allocator = limits, allocator
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; QueueFullError when the queue is at its bound."""
        if len(self.waiting) >= self.limits.max_queued:
            raise QueueFullError(f"the queue holds {len(self.waiting)} requests, its bound; try again later")
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence, running or waiting, and release its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.allocator.release(sequence.blocks)
            sequence.blocks = []
        else:
            self.waiting.remove(sequence)

    def next_batch(self) -> list[Slice]:
        """Choose the next step: every decode token, then prompt chunks in order of arrival, within the budget.

        Slices of one token come first in the list, as the step layout needs them.
        """
        self._admit()
        batch = [Slice(s, 1) for s in self.running if s.num_pending == 1][: self.limits.step_tokens]
        budget = self.limits.step_tokens - len(batch)
        for sequence in self.running:
            if sequence.num_pending > 1 and budget > 0:
                batch.append(Slice(sequence, min(sequence.num_pending, budget)))
                budget -= batch[-1].num_tokens
        return sorted(batch, key=lambda piece: piece.num_tokens > 1)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.limits.max_running:
            sequence = self.waiting[0]
            if not self.allocator.can_allocate(sequence.capacity):
                return  # first come, first served: nobody overtakes
            sequence.blocks = self.allocator.allocate(sequence.capacity)
            self.running.append(self.waiting.popleft())
