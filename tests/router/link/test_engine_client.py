"""What an engine's late words about a request that has ended do to its stream: nothing."""

import asyncio
from contextlib import aclosing

import zmq
import zmq.asyncio

from pregate.router.link.client import EngineClient
from pregate.router.link.messages import (
    FailedEvent,
    FinishedEvent,
    SamplingParams,
    SubmitRequest,
    TokensEvent,
)
from pregate.router.link.packet import pack, unpack


async def stream_with_late_failure():
    context = zmq.Context()
    engine = zmq.asyncio.Context.shadow(context).socket(zmq.ROUTER)
    engine.bind("inproc://late")
    client = EngineClient("inproc://late", context=context)
    events = []
    async with aclosing(client.generate(SubmitRequest("r", (1, 2), SamplingParams(max_tokens=4)))) as stream:
        first = asyncio.ensure_future(anext(stream))
        submitted = False
        while not submitted:
            peer, packet = await asyncio.wait_for(engine.recv_multipart(), 5)
            submitted = any(isinstance(m, SubmitRequest) for m in unpack(packet))
        # The door's keep-alive named "r" and crossed its end: the engine does not know the request any more.
        end = [
            TokensEvent("r", (7,)),
            FinishedEvent("r", "length", 2, 1, (3,)),
            FailedEvent("r", "UNAVAILABLE", "late"),
        ]
        await engine.send_multipart([peer, pack(end)])
        events.append(await asyncio.wait_for(first, 5))
        events += [event async for event in stream]
    await client.close()
    engine.close(linger=0)
    return events


def test_a_failure_after_the_end_is_ignored():
    events = asyncio.run(stream_with_late_failure())
    assert [type(event) for event in events] == [TokensEvent, FinishedEvent]
