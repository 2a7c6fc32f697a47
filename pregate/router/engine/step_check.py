"""The invariants of a step, in code: run in tests, and with `--check-steps` before every step."""

from __future__ import annotations

from collections.abc import Sequence as Many

from pregate.router.engine.scheduler import Scheduler, Slice


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
    order = [s.order for s in scheduler.running]
    assert order == sorted(order), "the running set is out of order"
    assert all(not s.table and not s.is_running for s in scheduler.waiting), "a waiting sequence owns blocks"
    assert all(s.is_running for s in scheduler.running), "a running sequence is not marked so"
    scheduler.allocator.check(s.table for s in scheduler.running)
