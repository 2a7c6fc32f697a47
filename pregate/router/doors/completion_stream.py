"""One completion of a request as it comes: the engine's events in, chunks of text and a Completion out."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from pregate.base.completion import Chunk, Completion
from pregate.base.errors import DeadlineError
from pregate.base.sampling import MAX_SEED
from pregate.router.doors.completion_text import CompletionText
from pregate.router.doors.in_flight import Taken
from pregate.router.doors.request_watch import TextWatch
from pregate.router.link.engines import Engine
from pregate.router.link.messages import ABORTED, FinishedEvent, SubmitRequest, TokensEvent


def copies_of(request: SubmitRequest, n: int) -> list[SubmitRequest]:
    """Return the request n times, each with an id of its own and, where a seed is given, the next seed."""
    seed = request.sampling.seed
    return [request] + [
        replace(
            request,
            request_id=uuid.uuid4().hex,
            sampling=request.sampling if seed is None else replace(request.sampling, seed=(seed + i) & MAX_SEED),
        )
        for i in range(1, n)
    ]


async def completion_stream(
    engine: Engine, request: SubmitRequest, text: CompletionText, request_id: str, taken: Taken, watch: TextWatch
) -> AsyncGenerator[Chunk | Completion, None]:
    """Yield the chunks of `text`, what was generated before in the first, then its Completion, called `request_id`.

    Raises DeadlineError, and what the engine's stream does.
    """
    if request.num_generated:
        chunk = text.push(TokensEvent(request.request_id, request.token_ids[-request.num_generated :]))
        if chunk is not None:
            yield chunk
    if text.stopped or taken.aborted:
        aborted = FinishedEvent(request.request_id, ABORTED, 0, 0, ())
        completion = text.completion(request_id, aborted if taken.aborted else None)
        watch.ended(completion.finish_reason, None)
        yield completion
        return
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            if isinstance(event, TokensEvent):
                if event.token_ids:
                    watch.tokens(len(event.token_ids))
                chunk = text.push(event)
            else:
                if event.reason == "deadline":
                    raise DeadlineError("the deadline passed before the answer was complete")
                chunk = text.flush()
            if chunk is not None:
                yield chunk
            if text.stopped or not isinstance(event, TokensEvent):
                end = None if isinstance(event, TokensEvent) else event
                completion = text.completion(request_id, end)
                watch.ended(completion.finish_reason, None if completion.finish_reason == ABORTED else end)
                yield completion
                return
