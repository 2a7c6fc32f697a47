import asyncio
from contextlib import suppress

import pytest

from pregate.router.doors.together import together


async def numbers(*values):
    for value in values:
        yield value


async def fails():
    raise ValueError("first")
    yield


async def loses_a_cancellation():
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(30)
    while True:
        yield 1


async def all_of(*streams):
    return [item async for item in together(streams)]


def test_every_item_comes_once():
    assert sorted(asyncio.run(all_of(numbers(1, 2, 3), numbers(), numbers(4)))) == [1, 2, 3, 4]


@pytest.mark.parametrize("other", [numbers(*range(100)), loses_a_cancellation()], ids=["in time", "late"])
def test_an_error_ends_the_others_too(other):
    """Also one that goes on, and then waits for room in a queue that nobody empties."""
    with pytest.raises(ValueError, match="first"):
        asyncio.run(asyncio.wait_for(all_of(other, fails()), 10))
