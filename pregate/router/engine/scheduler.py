"""Which tokens run next: decodes and prompt chunks mixed, in an order that a policy gives. No torch, no clock.

Data on its way: requests -> the queue -> the running set, whose sequences own blocks of the KV cache -> the order of a
step -> its slices, within the budgets of tokens and blocks -> `complete`, which says that they are computed.

Policies: `fifo`, whoever came first; `decode-first` and `prefill-first`, running texts or new prompts before the others
(while nobody is preempted and priorities are equal, decode-first is fifo: whoever decodes came first); `path`, what
makes the cheapest step (`batching.py`).
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from pregate.base.errors import QueueFullError
from pregate.router.engine.batching import Choice, PathBatcher
from pregate.router.engine.blocks import BlockAllocator
from pregate.router.engine.sequence import Sequence

Policy: TypeAlias = Literal["fifo", "decode-first", "prefill-first"]
#: Where steps are chosen by path and hosts load ahead, `TRIAL_STEPS` of `TRIAL_EVERY` take whoever came first, which
#: shows what that costs: of those hosts know before what they ask for.
TRIAL_STEPS, TRIAL_EVERY = 16, 256


@dataclass(frozen=True)
class SchedulerLimits:
    """Bounds of the queue and of one step. `step_tokens` counts decode tokens and prompt tokens together,
    `prompt_logit_rows` those of prompts whose logprobs are asked for. Whoever could run and was passed over for
    `max_batching_delay_s` goes first."""

    max_running: int
    max_queued: int
    step_tokens: int
    max_queued_bytes: int = 1 << 30
    max_queued_tokens: int = 1 << 22
    prompt_logit_rows: int = 1 << 30
    max_batching_delay_s: float = math.inf


class Slice(NamedTuple):
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
    """Owns the queue and the running set, both in order of priority, then of arrival.

    With a `batcher` steps are chosen by path, else by `policy`.

    Blocks are given as a sequence grows. Where there are none left the last running sequence in that order gives up its
    own and waits, before all that came later, with its tokens and paths, to be computed again (preemption by
    recomputation, as in vLLM); the first never is, so every sequence that fits the cache alone comes to its end.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        allocator: BlockAllocator,
        prefix_sharing: bool = True,
        policy: Policy = "fifo",
        batcher: PathBatcher | None = None,
    ) -> None:
        self.limits, self.allocator, self.prefix_sharing = limits, allocator, prefix_sharing
        self.policy, self.batcher = policy, batcher
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self.num_matched_tokens = 0
        self.choice: Choice | None = None
        #: Whether hosts load ahead, and lack units.
        self.tries = False
        self._num_arrived = self._logit_rows = self._num_tries = 0

    @property
    def queued_bytes(self) -> int:
        """Bytes of the prompts and paths that wait; the link's I/O thread may ask while a step runs."""
        return sum(sequence.waiting_bytes for sequence in tuple(self.waiting))

    def check_room(self, sequence: Sequence) -> None:
        """QueueFullError when the queue is at one of its bounds. `max_queued` is of those who do not fit yet:
        requests that come together are all in the queue before a step takes in who may run."""
        left = self.waiting[len(self._admissible()) :]
        num_new = sum(s.num_generated == s.num_resumed for s in left)
        if num_new >= self.limits.max_queued:
            raise QueueFullError(f"the queue holds {num_new} requests, its bound; try again later")
        num_tokens = sum(len(s.token_ids) for s in self.waiting)
        if num_tokens and num_tokens + len(sequence.token_ids) > self.limits.max_queued_tokens:
            most = self.limits.max_queued_tokens
            raise QueueFullError(
                f"the queue holds {num_tokens} tokens of prompts, its bound is {most}; try again later"
            )
        num_bytes = self.queued_bytes
        if num_bytes and num_bytes + sequence.waiting_bytes > self.limits.max_queued_bytes:
            raise QueueFullError(
                f"the queue holds {num_bytes} bytes of prompts and paths, its bound is {self.limits.max_queued_bytes};"
                " try again later"
            )

    def add(self, sequence: Sequence, now_s: float = 0.0) -> None:
        """Queue a sequence; QueueFullError when the queue is at one of its bounds."""
        self.check_room(sequence)
        sequence.ready_s = now_s
        sequence.arrival, self._num_arrived = self._num_arrived, self._num_arrived + 1
        insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence, running or waiting, and what it owns."""
        if sequence.is_running:
            self._take_out(sequence)
        else:
            self.waiting.remove(sequence)

    def next_step(self, now_s: float = 0.0) -> list[Slice]:
        """Choose the next step. `now_s`, of any clock, tells how long somebody was passed over.

        Slices of one token come first, as the step layout needs them, and in order of their first blocks, as reading
        their contexts in one view does.
        """
        turn, most = self._turn(now_s)
        num_preempted = self.num_preempted
        pieces = self._slices(turn, most) or self._slices(self._longest_first(now_s), self.limits.step_tokens)
        if not pieces and len(self.running) > 1:
            # Prompts that have all begun and none of which gets another block: the youngest makes room.
            self._preempt(self.running[-1])
        if not pieces and self.num_preempted > num_preempted:
            # Also after somebody gave up his own blocks, too late for those before him. Each round fewer run.
            return self.next_step(now_s)
        for piece in pieces:
            piece.sequence.ready_s = now_s
        single = [piece for piece in pieces if piece.num_tokens == 1]
        single.sort(key=lambda piece: piece.sequence.table[0])
        return single + [piece for piece in pieces if piece.num_tokens > 1]

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

    def _longest_first(self, now_s: float) -> list[Sequence]:
        """All in order of arrival, but with a batcher whoever is overdue first: none of those it chose found blocks."""
        everybody = [*self.running, *self.waiting]
        if self.batcher is not None:
            oldest_s = now_s - self.limits.max_batching_delay_s
            everybody.sort(key=lambda s: s.ready_s if s.ready_s < oldest_s else math.inf)
        return everybody

    def _turn(self, now_s: float) -> tuple[list[Sequence], int]:
        """Who is to run, in order, and with how many tokens at most."""
        if self.batcher is not None:
            return self._cheapest(self.batcher, now_s)
        if self.policy == "fifo":
            return [*self.running, *self.waiting], self.limits.step_tokens
        decodes, prompts = [], []
        for sequence in self.running:
            (decodes if sequence.num_pending == 1 else prompts).append(sequence)
        prompts += self.waiting
        by_policy = {"decode-first": [*decodes, *prompts], "prefill-first": [*prompts, *decodes]}
        return by_policy[self.policy], self.limits.step_tokens

    def _cheapest(self, batcher: PathBatcher, now_s: float) -> tuple[list[Sequence], int]:
        """Who makes the cheapest step, of those who can run, which come in order of arrival; all in that order where
        somebody has no paths."""
        budget, running = self.limits.step_tokens, self.running
        pending = [len(s.token_ids) - s.num_computed for s in running]
        most = max(budget - pending.count(1), budget // 2, 1)  # of one prompt, so that texts go on beside it
        begin = self._beginning(pending)
        pending += [s.num_pending for s in begin]
        members = [*running, *begin]
        if not members or None in [s.paths for s in members]:
            return [*running, *self.waiting], budget
        oldest_s = now_s - self.limits.max_batching_delay_s
        late = sorted((s for s in members if s.ready_s < oldest_s), key=lambda s: s.ready_s)
        if late:
            members = [*late, *(s for s in members if s.ready_s >= oldest_s)]
            pending = [s.num_pending for s in members]
        rows = [s.next_rows(batcher.layout, most) for s in members]
        trial = self.tries and self._num_tries % TRIAL_EVERY < TRIAL_STEPS
        self._num_tries += self.tries
        self.choice = batcher.choose([min(n, most) for n in pending], rows, len(late), budget, trial)
        return [members[n] for n in self.choice.order], most

    def _beginning(self, pending: list[int]) -> list[Sequence]:
        """Who of the queue may begin where steps are chosen by path: nobody while as many run as fit a step, or
        prompts that run have half of one before them. A prompt makes every token of a step cheaper: without this
        bound as many as may run would, and all be slow alike. `pending`: tokens of those who run."""
        budget, found = self.limits.step_tokens, []
        num_prompt_tokens = sum(num for num in pending if num > 1)
        for sequence in self._admissible():
            if len(self.running) + len(found) >= budget or 2 * num_prompt_tokens >= budget:
                break
            found.append(sequence)
            num_prompt_tokens += len(sequence.token_ids)
        return found

    def _admissible(self) -> list[Sequence]:
        """Who of the queue could begin now, all together and in order: nobody overtakes for want of blocks."""
        found, num_free = [], self.allocator.num_free
        for sequence in self.waiting[: self.limits.max_running - len(self.running)]:
            num_free -= self.allocator.blocks_for(len(sequence.token_ids) + 1)
            if num_free < 0:
                break
            found.append(sequence)
        return found

    def _slices(self, order: list[Sequence], most: int) -> list[Slice]:
        """The next tokens of these, at most so many of each, in this order and as far as the budgets reach."""
        self._logit_rows = self.limits.prompt_logit_rows
        found: dict[int, Slice] = {}
        budget, admitting, block_size = self.limits.step_tokens, True, self.allocator.block_size
        before = {id(s) for s in self.running}
        for sequence in order:
            if not budget:
                break
            if not sequence.is_running:
                # First come, first served: nobody overtakes; and nobody who just gave up his blocks takes them again.
                admitting = admitting and id(sequence) not in before and self._admit(sequence)
                if not admitting:
                    continue
            if sequence.num_pending == 1 and not sequence.wants_prompt_logits:
                if len(sequence.table) * block_size <= sequence.num_computed:
                    budget += self._make_room(sequence, found)
                    if not sequence.is_running:
                        continue
                found[id(sequence)] = Slice(sequence, 1)
                budget -= 1
            elif (piece := self._chunk(sequence, min(budget, most))) is not None:
                found[id(sequence)] = piece
                budget -= piece.num_tokens
        return list(found.values())

    def _make_room(self, sequence: Sequence, found: dict[int, Slice]) -> int:
        """Own blocks for the next token, which the last of the running give up where there are none: perhaps the
        sequence itself. Returns how many tokens of the step are free again."""
        num_tokens = 0
        while not self.allocator.grow(sequence.table, sequence.num_computed + 1):
            last = self.running[-1]
            self._preempt(last)
            piece = found.pop(id(last), None)
            num_tokens += piece.num_tokens if piece is not None else 0
            if last is sequence:
                break
        return num_tokens

    def _chunk(self, sequence: Sequence, budget: int) -> Slice | None:
        """As much of a prompt as there are blocks for: nobody is preempted for it."""
        room = (len(sequence.table) + self.allocator.num_free) * self.allocator.block_size - sequence.num_computed
        num_tokens = min(sequence.num_pending, budget, room)
        if sequence.wants_prompt_logits:
            num_tokens = min(num_tokens, self._logit_rows)
            self._logit_rows -= max(0, num_tokens)
        if num_tokens < 1:
            return None
        grown = self.allocator.grow(sequence.table, sequence.num_computed + num_tokens)
        assert grown, "there was room"
        return Slice(sequence, num_tokens)

    def _admit(self, sequence: Sequence) -> bool:
        """Take it from the queue, with what is known of its beginning, where there is room for all its tokens."""
        if len(self.running) >= self.limits.max_running or (sequence.wants_prompt_logits and not self._logit_rows):
            return False
        if self.prefix_sharing and not sequence.wants_prompt_logits:
            sequence.table = self.allocator.match(sequence.token_ids, sequence.salt)
        missing = self.allocator.blocks_for(len(sequence.token_ids) + 1) - len(sequence.table)
        if missing > self.allocator.num_free:
            self.allocator.release(sequence.table)
            return False
        sequence.num_published = len(sequence.table)
        sequence.num_computed = len(sequence.table) * self.allocator.block_size
        self.num_matched_tokens += sequence.num_computed
        self.waiting.remove(sequence)
        sequence.is_running = True
        insort(self.running, sequence, key=_order)
        return True

    def _take_out(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.is_running = False
        self.allocator.release(sequence.table)

    def _preempt(self, sequence: Sequence) -> None:
        self._take_out(sequence)
        sequence.num_computed = sequence.num_published = 0
        insort(self.waiting, sequence, key=_order)
        self.num_preempted += 1


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
