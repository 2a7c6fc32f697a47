"""Policies of the scheduler: the order each gives; and by path nothing is lost, nobody waits too long, all end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pregate.model.packed_paths import PackedPaths
from pregate.model.paths import Paths
from pregate.router.engine.batching import PathBatcher
from pregate.router.engine.blocks import BlockAllocator
from pregate.router.engine.scheduler import Scheduler, SchedulerLimits
from pregate.router.engine.sequence import Sequence
from pregate.router.engine.step_check import check_step
from pregate.router.link.messages import SamplingParams
from tests.router.engine.batching_cases import costs, layout, random_ids

LAYERS, ROUTED, ACTIVE = 2, 5, 1


def sequence(name, num_prompt, max_tokens, rng) -> Sequence:
    tokens = rng.integers(0, 50, num_prompt).tolist()
    one = Sequence(name, tokens, num_prompt, max_tokens, SamplingParams(max_tokens), 0, None, np.zeros(1))
    one.paths = PackedPaths.of(Paths(random_ids(rng, num_prompt, LAYERS, ROUTED, ACTIVE)), ROUTED - 1)
    return one


def scheduler(policy: Any, num_blocks=100, **limits) -> Scheduler:
    """Steps in which units are the whole cost, so that batches by path leave many out."""
    limits = SchedulerLimits(
        **{"max_running": 8, "max_queued": 50, "step_tokens": 10, "max_batching_delay_s": 3.0} | limits
    )
    batcher = PathBatcher(layout(LAYERS, ROUTED), costs(step_s=1e-4)) if policy == "path" else None
    return Scheduler(limits, BlockAllocator(num_blocks, 4), False, "fifo" if policy == "path" else policy, batcher)


def room_to_begin(s: Scheduler) -> int:
    """How many of the queue may begin: as many as fit a step beside those that run, until prompts are half of one."""
    left = sum(one.num_pending for one in s.running if one.num_pending > 1)
    num = 0
    for one in s.waiting:
        if len(s.running) + num >= s.limits.step_tokens or left >= s.limits.step_tokens / 2:
            break
        num, left = num + 1, left + one.num_pending
    return num


def run_step(s: Scheduler, now_s: float, rng) -> list:
    """A step as the engine takes it: checked, completed, paths of new tokens fixed."""
    late = {id(one): one for one in [*s.running, *s.waiting] if one.ready_s < now_s - s.limits.max_batching_delay_s}
    running, num_preempted, may_begin = list(s.running), s.num_preempted, room_to_begin(s)
    step = s.next_step(now_s)
    check_step(step, s)
    if s.choice is not None and s.num_preempted == num_preempted:
        begun = [one for one in s.running if one not in running]
        assert len(begun) <= may_begin, "more run than fit a step, or beside prompts that fill half of one"
    if s.batcher is not None and s.num_preempted == num_preempted:
        passed = [one for one in running if id(one) in late and one.num_pending == 1 and one.ready_s != now_s]
        used = sum(p.num_tokens for p in step if id(p.sequence) in late)
        assert not passed or used >= s.limits.step_tokens, "one that is overdue was passed over"
    sampling = [p.sequence for p in step if p.samples]
    s.complete(step)
    for one in sampling:
        one.token_ids.append(int(rng.integers(0, 50)))
        if one.num_generated == one.max_tokens:
            s.remove(one)
            continue
        ids = random_ids(rng, 1, LAYERS, ROUTED, ACTIVE)
        one.paths.append(Paths(ids))
        one.next_rows_U = layout(LAYERS, ROUTED).rows_each(ids)[0]
    return step


def test_what_a_prompt_asks_of_the_units_is_counted_anew_when_they_move_and_when_it_has_grown():
    """It was that of the units' places before, and after a preemption that of the prompt alone."""
    rng = np.random.default_rng(0)
    one, before = sequence("a", 6, 9, rng), layout(LAYERS, ROUTED, num_hosts=2)
    hosts_of_LR = np.tile(np.arange(ROUTED)[::-1] % 2, (LAYERS, 1))
    after, was_U = before.placed(hosts_of_LR, 2)
    assert list(was_U) != sorted(was_U)
    assert one.next_rows(before, 100).tolist() == before.rows(one.paths.slice(0, 6).ids).tolist()
    one.placed(was_U)
    assert one.next_rows(after, 100).tolist() == after.rows(one.paths.slice(0, 6).ids).tolist()
    for _ in range(3):  # it ran, and gave up what it had
        one.token_ids.append(3)
        one.paths.append(Paths(random_ids(rng, 1, LAYERS, ROUTED, ACTIVE)))
    assert one.next_rows(after, 100).tolist() == after.rows(one.paths.slice(0, 9).ids).tolist()
    assert one.next_rows(after, 4).tolist() == after.rows(one.paths.slice(0, 4).ids).tolist()


def test_decodes_or_prompts_come_first_as_the_policy_says():
    rng = np.random.default_rng(0)
    for policy, expected in (
        ("fifo", [("a", 1), ("b", 9)]),
        ("decode-first", [("a", 1), ("b", 9)]),
        ("prefill-first", [("b", 10)]),
    ):
        s = scheduler(policy)
        s.add(sequence("a", 6, 5, rng))
        run_step(s, 0.0, rng)
        s.add(sequence("b", 30, 5, rng))
        assert [(p.sequence.request_id, p.num_tokens) for p in run_step(s, 1.0, rng)] == expected


def test_read_me_s_endless_case_ends():
    """Queues that cannot fill the budget, and one text whose experts nobody shares: its printed algorithm takes the
    longest queue for ever and never the rare one."""
    rng = np.random.default_rng(1)
    s = scheduler("path", step_tokens=64)
    for name in "abcdef":
        one = sequence(name, 1, 40, rng)
        one.paths = PackedPaths.of(Paths(np.full((1, LAYERS, 1), name == "f", dtype=np.int16)), ROUTED - 1)
        s.add(one)
    waited, last_s = 0.0, 0.0
    for number in range(400):
        for piece in run_step(s, float(number), rng):
            if piece.sequence.request_id == "f":
                waited, last_s = max(waited, number - last_s), float(number)
        if not (s.running or s.waiting):
            break
    assert not s.running and not s.waiting
    assert waited <= 3 + 1, "the bound, and the step that runs when it passes"


@pytest.mark.parametrize("policy", ["path", "fifo", "decode-first", "prefill-first"])
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 14), st.integers(1, 10), st.integers(0, 3)), min_size=1, max_size=14),
    st.integers(6, 14),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 10**6),
)
def test_whatever_arrives_every_request_ends(policy, arrivals, num_blocks, step_tokens, max_running, seed):
    """Random arrivals and priorities, a cache of a few blocks, cancellations: budgets held, nothing lost."""
    rng = np.random.default_rng(seed)
    s = scheduler(policy, num_blocks, step_tokens=step_tokens, max_running=max_running)
    todo = [(wait, sequence(str(n), p, m, rng)) for n, (p, m, wait) in enumerate(arrivals)]
    for number in range(3000):
        while todo and (todo[0][0] <= 0 or not (s.running or s.waiting)):
            one = todo.pop(0)[1]
            one.priority = int(rng.integers(0, 2))
            s.add(one, float(number))
        todo = [(wait - 1, one) for wait, one in todo]
        live = [*s.running, *s.waiting]
        if live and rng.random() < 0.05:
            s.remove(live[int(rng.integers(len(live)))])
        step = run_step(s, float(number), rng)
        assert step or not (s.running or s.waiting), "work is left and nothing runs"
        if not todo and not s.running and not s.waiting:
            break
    assert not todo and not s.running and not s.waiting
    s.allocator.check([])


def test_blocks_given_up_after_others_found_none_are_given_in_the_same_step(monkeypatch):
    """A prompt is chosen and finds no block, nor does it when all are asked; then the last text gives up its own."""
    rng = np.random.default_rng(0)
    s = scheduler("fifo", num_blocks=5, step_tokens=4)
    prompt, text = sequence("prompt", 16, 1, rng), sequence("text", 4, 14, rng)
    s.add(prompt)
    s.add(text)
    order = prompt
    monkeypatch.setattr(s, "_turn", lambda now_s: ([order], 4))
    run_step(s, 0.0, rng)
    order = text
    while text.num_computed < 16:
        run_step(s, 0.0, rng)
    assert s.allocator.num_free == 0
    order = prompt
    assert [(p.sequence, p.num_tokens) for p in run_step(s, 0.0, rng)] == [(prompt, 4)]
    assert not text.is_running


def test_by_path_no_more_begin_than_fit_a_step_and_a_prompt_waits_for_those_under_way():
    """Else all that may run would, as a prompt makes every token of a step cheaper, and all be slow alike."""
    rng = np.random.default_rng(3)
    s = scheduler("path", step_tokens=10, max_running=40)
    for n in range(3):
        s.add(sequence(f"prompt {n}", 23, 2, rng))
    seen = []
    for _ in range(3):
        run_step(s, 0.0, rng)
        seen.append([(one.request_id, one.num_pending) for one in s.running])
    assert seen[:2] == [[("prompt 0", 13)], [("prompt 0", 3)]]
    assert [name for name, _ in seen[2]] == ["prompt 0", "prompt 1"], "less than half a step was left"
    s = scheduler("path", step_tokens=10, max_running=40)
    for n in range(30):
        s.add(sequence(f"text {n}", 1, 9, rng))
    most = 0
    for number in range(400):
        run_step(s, float(number), rng)
        most = max(most, len(s.running))
    assert most == 10 and not s.running and not s.waiting


@pytest.mark.parametrize(("tries", "num_trials"), [(False, 0), (True, 32)])
def test_where_hosts_load_ahead_some_steps_try_whoever_came_first(tries, num_trials, monkeypatch):
    rng, trials = np.random.default_rng(6), []
    choose = PathBatcher.choose
    monkeypatch.setattr(PathBatcher, "choose", lambda *given: (trials.append(given[-1]), choose(*given))[1])
    s = scheduler("path", num_blocks=200)
    s.tries = tries
    s.add(sequence("text", 1, 513, rng))
    for number in range(513):
        run_step(s, float(number), rng)
    assert trials.count(True) == num_trials + tries, "sixteen of 256, and of these that begin anew"
    assert trials[:16] == [tries] * 16 and not any(trials[16:256])


@pytest.mark.slow
def test_100_000_requests_all_end():
    """Four hosts, half of the units held, as many at once as there is room for, one in fifty cancelled."""
    rng, num_left, num_ended = np.random.default_rng(5), 100_000, 0
    s = scheduler("path", 400, step_tokens=48, max_running=64, max_queued=64)
    s.batcher = PathBatcher(layout(LAYERS, ROUTED, num_hosts=4), costs(4, step_s=1e-3))
    s.batcher.resident_U = rng.random(s.batcher.layout.num_units) < 0.5
    number = 0
    while num_left or s.running or s.waiting:
        for _ in range(min(num_left, 8, 64 - len(s.waiting))):
            s.add(sequence(str(num_left), int(rng.integers(1, 9)), int(rng.integers(1, 5)), rng), float(number))
            num_left -= 1
        before = len(s.running) + len(s.waiting)
        if rng.random() < 0.16:
            s.remove([*s.running, *s.waiting][int(rng.integers(before))])
        assert run_step(s, float(number), rng) or not (s.running or s.waiting), "work is left and nothing runs"
        num_ended += before - len(s.running) - len(s.waiting)
        number += 1
    assert num_ended == 100_000
    s.allocator.check([])


def test_without_paths_the_order_is_that_of_arrival():
    rng = np.random.default_rng(0)
    s = scheduler("path")
    for name in "ab":
        one = sequence(name, 3, 2, rng)
        one.paths = None
        s.add(one)
    assert [p.sequence.request_id for p in s.next_step(0.0)] == ["a", "b"]
