"""Several async streams as one, in the order their items come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

_T = TypeVar("_T")


async def together(streams: Sequence[AsyncGenerator[_T, None]]) -> AsyncGenerator[_T, None]:
    """Yield every stream's items. The first error ends all of them, as leaving early does (`contextlib.aclosing`)."""
    queue: asyncio.Queue[tuple[_T] | Exception | None] = asyncio.Queue(len(streams))

    async def feed(stream: AsyncGenerator[_T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put((item,))
            await queue.put(None)
        except Exception as error:  # noqa: BLE001 (raised again, by who reads)
            await queue.put(error)

    tasks = [asyncio.ensure_future(feed(stream)) for stream in streams]
    try:
        num_left = len(tasks)
        while num_left:
            got = await queue.get()
            if isinstance(got, Exception):
                raise got
            if got is None:
                num_left -= 1
            else:
                yield got[0]
    finally:
        left = set(tasks)
        while left:  # one that lost its cancellation, as in Python's wait_for before 3.12, would wait here for ever
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=1)
