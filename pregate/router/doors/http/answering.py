"""From what the engine gives to one answer or a stream of events, in whichever shape; who leaves cancels."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol, TypeAlias, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from pregate.base.completion import Chunk, Completion
from pregate.base.errors import UnavailableError
from pregate.router.doors.http.errors import JsonResponse, error_of
from pregate.router.doors.together import together

Item: TypeAlias = Chunk | Completion
Stream: TypeAlias = AsyncGenerator[Item, None]
_T = TypeVar("_T")


class Shape(Protocol):
    """How completions look to a client; `kind` and `chunk_kind` are what `object` says of a whole and of an event."""

    kind: str
    chunk_kind: str

    def whole(self, completion: Completion) -> dict[str, Any]:
        """Return a finished choice."""
        ...

    def pieces(self, item: Item) -> list[dict[str, Any]]:
        """Return what is new as choices, an event each; the end of one repeats nothing."""
        ...

    def counted(self, completion: Completion) -> int:
        """Return how many tokens were generated, as far as they are the client's."""
        ...


def numbered(streams: Sequence[Stream], n: int) -> Stream:
    """Join the streams of several prompts of `n` completions each; the index counts through all of them."""
    if len(streams) == 1:
        return streams[0]

    async def shifted(stream: Stream, first: int) -> Stream:
        async with aclosing(stream):
            async for item in stream:
                yield replace(item, index=first + item.index)

    return together([shifted(stream, number * n) for number, stream in enumerate(streams)])


async def answer(
    request: Request, stream: Stream, shape: Shape, head: dict[str, Any], num_choices: int, n: int
) -> Response:
    """Return all choices at once."""
    completions = await unless_gone(_completions(stream, num_choices), request)
    if completions is None:
        return GONE
    choices = [shape.whole(completion) for completion in completions]
    usage = _usage(completions, shape, n)
    return JsonResponse({**head, "object": shape.kind, "choices": choices, "usage": usage})


async def answer_streamed(
    request: Request, stream: Stream, shape: Shape, head: dict[str, Any], n: int, *, usage: bool
) -> Response:
    """Return server-sent events. What fails before the first token still gets a status of its own."""
    first = await unless_gone(anext(stream), request)
    if first is None:
        return GONE
    events = _events(first, stream, shape, {**head, "object": shape.chunk_kind}, n, usage=usage)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def unless_gone(work: Coroutine[Any, Any, _T], request: Request) -> _T | None:
    """Return what `work` gives, or None when the client went away first; the work is cancelled then."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


#: nginx's number for a client that is gone; nobody reads it.
GONE = Response(status_code=499)


def new_head(name: str, model: str) -> dict[str, Any]:
    """Return what every answer and event of one request begins with."""
    return {"id": name, "object": "", "created": int(time.time()), "model": model}


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _completions(stream: Stream, num: int) -> list[Completion]:
    async with aclosing(stream):
        found = [item async for item in stream if isinstance(item, Completion)]
    if len(found) != num:
        raise UnavailableError("the engine ended the stream early")
    return sorted(found, key=lambda completion: completion.index)


async def _events(
    first: Item, stream: Stream, shape: Shape, head: dict[str, Any], n: int, *, usage: bool
) -> AsyncGenerator[bytes, None]:
    """With `usage` the last event carries the counts, and every other one says that it does not."""
    completions: list[Completion] = []
    head |= {"usage": None} if usage else {}
    async with aclosing(stream):
        item: Item | None = first
        try:
            while item is not None:
                for choice in shape.pieces(item):
                    yield _event({**head, "choices": [choice]})
                completions += [item] if isinstance(item, Completion) else []
                item = await anext(stream, None)
            if usage:
                yield _event({**head, "choices": [], "usage": _usage(completions, shape, n)})
        except Exception as error:  # noqa: BLE001 (it has no other way to the client)
            yield _event(error_of(error))
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def _usage(completions: Sequence[Completion], shape: Shape, n: int) -> dict[str, int]:
    """A prompt counts once, however many completions it has."""
    prompt = sum(c.prompt_tokens for c in completions if c.index % n == 0)
    new = sum(map(shape.counted, completions))
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
