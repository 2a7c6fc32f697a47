"""First come, first served continuous batching: budgets, growth, preemption, prefix sharing."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pregate.base.errors import QueueFullError
from pregate.router.engine.blocks import BlockAllocator
from pregate.router.engine.scheduler import Scheduler, SchedulerLimits, Slice
from pregate.router.engine.sequence import Sequence
from pregate.router.engine.step_check import check_step
from pregate.router.link.messages import SamplingParams


def sequence(name: str, num_prompt: int, max_tokens: int = 4, first: int = 0) -> Sequence:
    tokens = list(range(first, first + num_prompt))
    return Sequence(name, tokens, num_prompt, max_tokens, SamplingParams(max_tokens), 0, None, np.zeros(1))


def scheduler(num_blocks: int = 100, prefix_sharing: bool = False, **limits) -> Scheduler:
    defaults = {"max_running": 8, "max_queued": 8, "step_tokens": 10} | limits
    return Scheduler(SchedulerLimits(**defaults), BlockAllocator(num_blocks, 4), prefix_sharing)


def run_step(s: Scheduler) -> list[Slice]:
    """One step: checked, completed, a token sampled for whoever is at its end, who is gone with its last one."""
    step = s.next_step()
    check_step(step, s)
    sampling = [piece.sequence for piece in step if piece.samples]
    s.complete(step)
    for one in sampling:
        one.token_ids.append(99)
        if one.num_generated == one.max_tokens:
            s.remove(one)
    return step


def shown(step: list[Slice]) -> list[tuple[str, int]]:
    return [(piece.sequence.request_id, piece.num_tokens) for piece in step]


def test_prompts_are_cut_to_the_budget_and_decodes_go_first():
    s = scheduler()
    s.add(sequence("a", 3))
    s.add(sequence("b", 12))
    assert shown(run_step(s)) == [("a", 3), ("b", 7)]
    assert shown(run_step(s)) == [("a", 1), ("b", 5)]


def test_single_token_slices_come_before_longer_ones():
    s = scheduler(step_tokens=4)
    s.add(sequence("a", 3))
    s.add(sequence("b", 5))
    assert [n for _, n in shown(run_step(s))] == [1, 3]


def test_nobody_overtakes_when_blocks_are_short():
    s = scheduler(num_blocks=3)
    for one in (sequence("a", 4), sequence("big", 9, 2), sequence("small", 1, 1)):
        s.add(one)
    assert shown(run_step(s)) == [("a", 4)], "small would fit, but came later"
    s.remove(s.running[0])
    assert shown(run_step(s)) == [("big", 9)]


def test_the_queue_is_bounded_by_number_and_by_bytes():
    s = scheduler(max_running=1, max_queued=1, max_queued_bytes=100)
    s.add(sequence("a", 5))
    with pytest.raises(QueueFullError, match="holds 40 bytes of prompts and paths, its bound is 100"):
        s.add(sequence("b", 8))
    s.add(sequence("c", 1))
    with pytest.raises(QueueFullError, match="holds 1 requests, its bound"):
        s.add(sequence("d", 1))


def test_those_who_may_run_do_not_count_as_queued_before_a_step_takes_them_in():
    """Thirty that come at once, where eight may run and four may wait; then where blocks are for two of them."""
    cases: list[tuple[dict[str, Any], int]] = [({}, 8 + 4), ({"num_blocks": 6}, 2 + 4)]
    for limits, num_taken in cases:
        s, taken = scheduler(max_queued=4, **limits), []
        for n in range(30):
            try:
                s.add(sequence(str(n), 9))
                taken.append(str(n))
            except QueueFullError:
                continue
        assert taken == [str(n) for n in range(num_taken)]


def test_the_queue_is_measured_while_another_thread_changes_it():
    """The I/O thread answers `info` while the compute thread takes requests in and out."""
    s, over = scheduler(max_queued=256), threading.Event()
    queued = [sequence(str(n), 3) for n in range(200)]

    def churn():
        while not over.is_set():
            for one in queued:
                s.add(one)
            for one in queued:
                s.remove(one)

    thread, interval = threading.Thread(target=churn), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        assert all(s.queued_bytes % 24 == 0 for _ in range(3000))
    finally:
        over.set()
        thread.join(20)
        sys.setswitchinterval(interval)


def test_removing_releases_blocks():
    s = scheduler()
    running, waiting = sequence("a", 6), sequence("b", 6)
    s.add(running)
    run_step(s)
    s.add(waiting)
    s.remove(running)
    s.remove(waiting)
    s.allocator.check([])


def test_a_preempted_sequence_keeps_its_tokens_and_comes_first():
    s = scheduler(num_blocks=4, step_tokens=20)
    s.add(sequence("a", 7, 9))
    s.add(sequence("b", 6, 9))
    assert shown(run_step(s)) == [("a", 7), ("b", 6)]
    while not s.num_preempted:
        run_step(s)
    assert [w.request_id for w in s.waiting] == ["b"] and s.waiting[0].num_computed == 0
    known = len(s.waiting[0].token_ids)
    s.add(sequence("c", 1))
    while all(r.request_id != "b" for r in s.running):
        last = run_step(s)
    assert ("b", known) in shown(last), "recomputed with what it had generated, before c begins"


def test_equal_beginnings_are_computed_once():
    s = scheduler(prefix_sharing=True, step_tokens=30)
    s.add(sequence("a", 11))
    run_step(s)
    s.add(sequence("b", 11))
    s.add(sequence("other", 11, first=50))
    assert shown(run_step(s)) == [("a", 1), ("b", 3), ("other", 11)]
    assert s.num_matched_tokens == 8


ARRIVALS = st.lists(
    st.tuples(st.integers(1, 14), st.integers(1, 10), st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=200)
@given(ARRIVALS, st.integers(6, 14), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.data())
def test_whatever_arrives_every_request_ends(arrivals, num_blocks, step_tokens, max_running, sharing, data):
    """Random arrivals with equal beginnings, a cache of a few blocks, cancellations: budgets held, nothing lost."""
    limits = {"step_tokens": step_tokens, "max_running": max_running, "max_queued": 20}
    s = scheduler(num_blocks, sharing, **limits)
    todo = [sequence(str(n), p, m, 50 * first) for n, (p, m, first, _) in enumerate(arrivals)]
    waits = [wait for *_, wait in arrivals]
    alive: list[Sequence] = []
    for _ in range(2000):
        if todo and waits[len(arrivals) - len(todo)] == 0:
            alive.append(todo.pop(0))
            s.add(alive[-1])
        elif todo:
            waits[len(arrivals) - len(todo)] -= 1
        live = [one for one in alive if one in s.running or one in s.waiting]
        if live and data.draw(st.integers(0, 15)) == 0:
            s.remove(data.draw(st.sampled_from(live)))
        step = run_step(s)
        if not todo and not s.running and not s.waiting:
            break
        assert step or todo or not live or not (s.running or s.waiting), "work is left and nothing runs"
    assert not todo and not s.running and not s.waiting
    s.allocator.check([])
