"""Which tokens run next: first come, first served, decodes and prompt chunks mixed. No torch, no clock.

Data on its way: requests -> the queue -> the running set, whose sequences own blocks of the KV cache -> the slices of
one step -> `complete`, which says that they are computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass

from pregate.base.errors import QueueFullError
from pregate.router.engine.blocks import BlockAllocator
from pregate.router.engine.sequence import Sequence


@dataclass(frozen=True)
class SchedulerLimits:
    """Bounds of the queue and of one step. `step_tokens` counts decode tokens and prompt tokens together."""

    max_running: int
    max_queued: int
    step_tokens: int
    max_queued_bytes: int = 1 << 30


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


class Scheduler:
    """Owns the queue and the running set, both in order of arrival.

    Blocks are given as a sequence grows. Where there are none left the youngest running sequence gives up its own and
    waits in front of the queue, with its tokens and paths, to be computed again (preemption by recomputation, as in
    vLLM); the oldest never is, so every sequence that fits the cache alone comes to its end.
    """

    def __init__(self, limits: SchedulerLimits, allocator: BlockAllocator, prefix_sharing: bool = True) -> None:
        self.limits, self.allocator, self.prefix_sharing = limits, allocator, prefix_sharing
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self.num_matched_tokens = 0
        self._num_arrived = 0

    @property
    def queued_bytes(self) -> int:
        """Bytes of the prompts and paths that wait; the link's I/O thread may ask while a step runs."""
        return sum(sequence.waiting_bytes for sequence in tuple(self.waiting))

    def check_room(self, sequence: Sequence) -> None:
        """QueueFullError when the queue is at one of its bounds."""
        num_new = sum(s.num_generated == 0 for s in self.waiting)
        if num_new >= self.limits.max_queued:
            raise QueueFullError(f"the queue holds {num_new} requests, its bound; try again later")
        num_bytes = self.queued_bytes
        if num_bytes and num_bytes + sequence.waiting_bytes > self.limits.max_queued_bytes:
            raise QueueFullError(
                f"the queue holds {num_bytes} bytes of prompts and paths, its bound is {self.limits.max_queued_bytes};"
                " try again later"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; QueueFullError when the queue is at one of its bounds."""
        self.check_room(sequence)
        sequence.arrival, self._num_arrived = self._num_arrived, self._num_arrived + 1
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence, running or waiting, and what it owns."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.allocator.release(sequence.table)
        else:
            self.waiting.remove(sequence)

    def next_step(self) -> list[Slice]:
        """Choose the next step: every decode token, then prompt chunks in order of arrival, within the budget.

        Slices of one token come first, as the step layout needs them, and in order of their first blocks, as reading
        their contexts in one view does.
        """
        decodes = self._decodes()
        budget = self.limits.step_tokens - len(decodes)
        chunks = self._chunks(budget)
        budget -= sum(piece.num_tokens for piece in chunks)
        chunks += self._admit(budget)
        if not decodes and not chunks and len(self.running) > 1:
            # Prompts that have all begun and none of which gets another block: the youngest makes room.
            self._preempt(self.running[-1])
            return self.next_step()
        single = [*decodes, *(piece for piece in chunks if piece.num_tokens == 1)]
        single.sort(key=lambda piece: piece.sequence.table[0])
        return single + [piece for piece in chunks if piece.num_tokens > 1]

    def complete(self, step: Many[Slice]) -> None:
        """Take note that the slices of a step are in the cache."""
        for piece in step:
            sequence = piece.sequence
            sequence.num_computed += piece.num_tokens
            full = min(sequence.num_computed, sequence.num_prompt) // self.allocator.block_size
            while self.prefix_sharing and sequence.num_published < full:
                place = sequence.num_published
                self.allocator.publish(sequence.table, place, sequence.token_ids, sequence.salt)
                sequence.num_published += 1

    def _decodes(self) -> list[Slice]:
        found: list[Slice] = []
        for sequence in self.running:  # of which only the end is taken off meanwhile
            if len(found) == self.limits.step_tokens:
                break
            if sequence.num_pending == 1 and self._make_room(sequence):
                found.append(Slice(sequence, 1))
        return found

    def _make_room(self, sequence: Sequence) -> bool:
        """Own blocks for the next token; False where the sequence itself was the youngest and had to go."""
        while not self.allocator.grow(sequence.table, sequence.num_computed + 1):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _chunks(self, budget: int) -> list[Slice]:
        """Further chunks of prompts that have begun: as much as there are blocks for, nobody is preempted for them."""
        found: list[Slice] = []
        for sequence in self.running:
            if sequence.num_pending > 1 and budget > 0:
                piece = self._chunk(sequence, budget)
                if piece is not None:
                    found.append(piece)
                    budget -= piece.num_tokens
        return found

    def _chunk(self, sequence: Sequence, budget: int) -> Slice | None:
        room = (len(sequence.table) + self.allocator.num_free) * self.allocator.block_size - sequence.num_computed
        num_tokens = min(sequence.num_pending, budget, room)
        if num_tokens < 1:
            return None
        grown = self.allocator.grow(sequence.table, sequence.num_computed + num_tokens)
        assert grown, "there was room"
        return Slice(sequence, num_tokens)

    def _admit(self, budget: int) -> list[Slice]:
        found: list[Slice] = []
        while self.waiting and len(self.running) < self.limits.max_running and budget > 0:
            sequence = self.waiting[0]
            if self.prefix_sharing:
                sequence.table = self.allocator.match(sequence.token_ids, sequence.salt)
            missing = self.allocator.blocks_for(len(sequence.token_ids) + 1) - len(sequence.table)
            if missing > self.allocator.num_free:
                self.allocator.release(sequence.table)
                break  # first come, first served: nobody overtakes
            sequence.num_published = len(sequence.table)
            sequence.num_computed = len(sequence.table) * self.allocator.block_size
            self.num_matched_tokens += sequence.num_computed
            self.running.append(self.waiting.popleft())
            self.running.sort(key=lambda s: s.arrival)
            piece = self._chunk(sequence, budget)
            assert piece is not None, "admitted with room for all its tokens"
            found.append(piece)
            budget -= piece.num_tokens
        return found

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.allocator.release(sequence.table)
        sequence.num_computed = sequence.num_published = 0
        self.waiting.appendleft(sequence)
        self.num_preempted += 1


def check_step(step: Many[Slice], scheduler: Scheduler) -> None:
    """AssertionError unless a step keeps its budget, runs every sequence once and on blocks of its own, and nothing is
    lost or owned without a table."""
    limits, size = scheduler.limits, scheduler.allocator.block_size
    assert sum(piece.num_tokens for piece in step) <= limits.step_tokens, "a step is over its budget"
    assert len({id(piece.sequence) for piece in step}) == len(step), "a sequence runs twice in a step"
    for piece in step:
        sequence = piece.sequence
        assert sequence in scheduler.running, "a slice of a sequence that does not run"
        assert piece.num_tokens >= 1 and piece.stop <= len(sequence.token_ids), "tokens that are not known"
        assert len(sequence.table) * size >= piece.stop, "tokens without a place in the cache"
        first_written = sequence.num_computed // size
        owners = [sum(block in s.table for s in scheduler.running) for block in sequence.table[first_written:]]
        assert all(count == 1 for count in owners), "a shared block would be written"
    assert len(scheduler.running) <= limits.max_running
    order = [s.arrival for s in scheduler.running]
    assert order == sorted(order), "the running set is out of order"
    assert all(not s.table for s in scheduler.waiting), "a waiting sequence owns blocks"
    scheduler.allocator.check(s.table for s in scheduler.running)
