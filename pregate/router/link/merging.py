"""Messages of one request that piled up, made fewer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pregate.router.link.messages import DoorBound, TokensEvent


async def drain(queue: asyncio.Queue[DoorBound]) -> list[DoorBound]:
    """What is there, once there is something."""
    messages = [await queue.get()]
    while not queue.empty():
        messages.append(queue.get_nowait())
    return messages


def merged(messages: Sequence[DoorBound]) -> list[DoorBound]:
    """The same, tokens that follow each other in one event. They are of one request."""
    found: list[DoorBound] = []
    for message in messages:
        last = found[-1] if found else None
        if isinstance(message, TokensEvent) and isinstance(last, TokensEvent):
            found[-1] = TokensEvent(
                message.request_id,
                last.token_ids + message.token_ids,
                last.logprobs + message.logprobs,
                last.prompt_logprobs + message.prompt_logprobs,
            )
        else:
            found.append(message)
    return found
