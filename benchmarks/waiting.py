"""Admission by thresholds, after Ao, Luo, Simchi-Levi, Wang (arXiv 2504.11320), in the simulation of `batching.py`.

Who waits is left out of a step until there are enough of a kind. Where nothing would run, or one has waited longer than
the delay bound, nobody is left out.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace

from pregate.router.engine.scheduler import Scheduler, Slice
from pregate.router.engine.sequence import Sequence


class WaitScheduler(Scheduler):
    """WAIT with prompts of one type: those that wait begin together, when there are `threshold` of them."""

    threshold = 4

    def left_out(self, now_s: float) -> list[Sequence]:
        """Who is not to run yet."""
        return self.waiting if len(self.waiting) < self.threshold else []

    def next_step(self, now_s: float = 0.0) -> list[Slice]:
        held = {id(s): s for s in self.left_out(now_s)}
        late = any(now_s - s.ready_s > self.limits.max_batching_delay_s for s in held.values())
        if not held or late or all(id(s) in held for s in [*self.running, *self.waiting]):
            return super().next_step(now_s)
        limits, (running, waiting) = self.limits, (self.running, self.waiting)
        aside = [[s for s in some if id(s) in held] for some in (running, waiting)]
        self.running, self.waiting = ([s for s in some if id(s) not in held] for some in (running, waiting))
        self.limits = replace(limits, max_running=max(1, limits.max_running - len(aside[0])))
        step = super().next_step(now_s)
        self.limits = limits
        self.running, self.waiting = (  # with those that began, or were preempted, meanwhile
            sorted([*some, *others], key=lambda s: s.order)
            for some, others in zip((self.running, self.waiting), aside, strict=True)
        )
        return step or super().next_step(now_s)


class NestedWaitScheduler(WaitScheduler):
    """Nested WAIT: how long an answer will be is not known. Answers pass through segments of so many tokens; at the
    beginning of each they wait for others to go on with, the fewer the fewer answers come so far."""

    segments: Many[tuple[int, int]] = ()

    def prepare(self, output_tokens: Many[int], num_segments: int = 4) -> None:
        """Segments of equal length for answers of these lengths: (tokens before it, how many go on together)."""
        size = -(-max(output_tokens) // num_segments)
        reached = [(n * size, sum(m > n * size for m in output_tokens)) for n in range(1, num_segments)]
        self.segments = [(at, max(1, round(self.threshold * num / len(output_tokens)))) for at, num in reached]
        self._released: dict[str, int] = {}

    def left_out(self, now_s: float) -> list[Sequence]:
        held = list(super().left_out(now_s))
        for at, threshold in self.segments:
            here = [s for s in self.running if s.num_generated == at and self._released.get(s.request_id) != at]
            if len(here) < threshold:
                held += here
            else:
                self._released.update({s.request_id: at for s in here})
        return held
