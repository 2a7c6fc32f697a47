"""The allocator of KV blocks: nothing lost, nothing owned twice, equal beginnings found, lanes kept apart."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pregate.router.engine.blocks import BlockAllocator

SIZE = 2


def computed(allocator: BlockAllocator, token_ids: list[int], salt: str = "") -> list[int]:
    """The table of a prompt that was matched, grown and computed."""
    table = allocator.match(token_ids, salt)
    known = len(table)
    assert allocator.grow(table, len(token_ids))
    for place in range(known, len(token_ids) // SIZE):
        allocator.publish(table, place, token_ids, salt)
    return table


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 12), st.integers(1, 5), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=60))
def test_whatever_happens_every_block_is_accounted_for(num_blocks, lane_blocks, events):
    """Prompts of few tokens, so that their beginnings are often equal; tables grow and go in any order."""
    allocator = BlockAllocator(num_blocks, SIZE, lane_blocks)
    tables: list[list[int]] = []
    for kind, number in events:
        if kind == 0:
            prompt = [number >> bit & 1 for bit in range(1 + number % 7)]
            table = allocator.match(prompt, "")
            known = len(table)
            if allocator.grow(table, len(prompt)):
                for place in range(known, len(prompt) // SIZE):
                    allocator.publish(table, place, prompt, "")
                tables.append(table)
            else:
                allocator.release(table)
        elif kind == 1 and tables:
            table = tables[number % len(tables)]
            before = list(table)
            grown = allocator.grow(table, len(table) * SIZE + number % 5)
            assert table[: len(before)] == before and (grown or table == before)
        elif tables:
            allocator.release(tables.pop(number % len(tables)))
        allocator.check(tables)
    for table in tables:
        allocator.release(table)
    allocator.check([])
    assert allocator.num_free == num_blocks


def test_equal_beginnings_share_full_blocks_and_one_token_is_left():
    allocator = BlockAllocator(10, SIZE)
    first = computed(allocator, [1, 2, 3, 4, 5])
    assert allocator.match([1, 2, 3, 4, 5], "") == first[:2]
    assert allocator.num_shared == 2
    assert allocator.match([1, 2, 3, 4], "") == first[:1], "the last token's logits are wanted"
    assert allocator.match([1, 9, 3, 4, 5], "") == []
    assert allocator.match([3, 4, 3, 4], "") == [], "the same tokens after others are not the same"
    assert allocator.match([1, 2, 3, 4, 5], "another tenant") == []


def test_two_that_computed_the_same_at_once_stay_apart_and_one_is_found():
    allocator = BlockAllocator(10, SIZE)
    tables = [[], []]
    for table in tables:
        allocator.grow(table, 5)
    for place in range(2):
        for table in tables:
            allocator.publish(table, place, [1, 2, 3, 4, 5], "")
    assert allocator.match([1, 2, 3, 4, 5], "") == tables[0][:2]
    allocator.release(tables[1])
    assert allocator.num_idle == 0, "what is known twice is free when its owner goes"


def test_the_longest_idle_go_first_and_are_then_unknown():
    allocator = BlockAllocator(4, SIZE)
    for prompt in ([1, 1, 1], [2, 2, 2]):
        allocator.release(computed(allocator, prompt))
    assert (allocator.num_idle, allocator.num_free) == (2, 4)
    table: list[int] = []
    assert allocator.grow(table, 3 * SIZE)
    assert not allocator.match([1, 1, 1], "") and allocator.match([2, 2, 2], "")


def test_sequences_begin_in_lanes_of_their_own_and_grow_side_by_side():
    allocator = BlockAllocator(12, SIZE, lane_blocks=4)
    tables: list[list[int]] = [[], [], []]
    for num_tokens in (2, 6):
        for table in tables:
            assert allocator.grow(table, num_tokens)
    assert tables == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    allocator.release(tables[1])
    again: list[int] = []
    assert allocator.grow(again, 2) and again == [4]


def test_the_lane_that_was_idle_for_longest_gives_way():
    allocator = BlockAllocator(8, SIZE, lane_blocks=4)
    for prompt in ([1, 1, 1, 1, 1], [2, 2, 2, 2, 2]):
        allocator.release(computed(allocator, prompt))
    table: list[int] = []
    assert allocator.grow(table, 3 * SIZE) and table == [0, 1, 2]
    assert allocator.match([2, 2, 2, 2, 2], "") == [4, 5]


def test_a_table_that_does_not_fit_grows_by_nothing():
    allocator = BlockAllocator(2, SIZE)
    table: list[int] = []
    assert not allocator.grow(table, 5) and table == []
    assert allocator.num_free == 2


def test_a_double_release_is_noticed():
    allocator = BlockAllocator(2, SIZE)
    table: list[int] = []
    allocator.grow(table, 4)
    copy = list(table)
    allocator.release(table)
    with pytest.raises(AssertionError, match="twice"):
        allocator.release(copy)
