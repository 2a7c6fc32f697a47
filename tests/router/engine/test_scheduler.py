"""First come, first served continuous batching and the block allocator under it."""

import numpy as np
import pytest

from pregate.base.errors import QueueFullError
from pregate.router.engine.blocks import BlockAllocator, slots_of
from pregate.router.engine.scheduler import Batcher, BatchLimits
from pregate.router.engine.sequence import Sequence
from pregate.router.link.messages import SamplingParams


def sequence(name, num_prompt, max_tokens=4):
    sampling = SamplingParams(max_tokens)
    return Sequence(name, list(range(num_prompt)), num_prompt, max_tokens, sampling, 0, None, np.zeros(1))


def batcher(num_blocks=100, **limits):
    defaults = {"max_running": 8, "max_queued": 8, "step_tokens": 10} | limits
    return Batcher(BatchLimits(**defaults), BlockAllocator(num_blocks, 4))


def advance(batch):
    for piece in batch:
        done = piece.samples
        piece.sequence.num_computed += piece.num_tokens
        if done:
            piece.sequence.token_ids.append(99)


def test_prompts_are_cut_to_the_budget_and_decodes_go_first():
    b = batcher()
    first, second = sequence("a", 3), sequence("b", 12)
    b.add(first)
    b.add(second)
    batch = b.next_batch()
    assert [(s.sequence.request_id, s.num_tokens, s.samples) for s in batch] == [("a", 3, True), ("b", 7, False)]
    advance(batch)
    batch = b.next_batch()
    assert [(s.sequence.request_id, s.num_tokens, s.samples) for s in batch] == [("a", 1, True), ("b", 5, True)]


def test_single_token_slices_come_before_longer_ones():
    b = batcher(step_tokens=4)
    b.add(sequence("a", 3))
    b.add(sequence("b", 5))
    assert [s.num_tokens for s in b.next_batch()] == [1, 3]


def test_nobody_overtakes_when_blocks_are_short():
    b = batcher(num_blocks=3)
    b.add(sequence("a", 4))  # 8 tokens: 2 blocks
    b.add(sequence("big", 8))  # 3 blocks: waits
    b.add(sequence("small", 1, 1))  # would fit, but came later
    assert [s.sequence.request_id for s in b.next_batch()] == ["a"]
    b.remove(b.running[0])
    assert [s.sequence.request_id for s in b.next_batch()] == ["big"]


def test_the_queue_is_bounded():
    b = batcher(max_queued=1)
    b.add(sequence("a", 1))
    with pytest.raises(QueueFullError, match="bound"):
        b.add(sequence("b", 1))


def test_removing_releases_blocks():
    b = batcher()
    running, waiting = sequence("a", 6), sequence("b", 6)
    b.add(running)
    b.next_batch()
    b.add(waiting)
    b.remove(running)
    b.remove(waiting)
    b.allocator.check_idle()


def test_allocator_notices_a_double_release():
    allocator = BlockAllocator(2, 4)
    blocks = allocator.allocate(8)
    allocator.release(blocks)
    with pytest.raises(AssertionError, match="twice"):
        allocator.release(blocks)


def test_slots_follow_the_block_table():
    assert slots_of([5, 2], 3, 5, 4).tolist() == [23, 8]
