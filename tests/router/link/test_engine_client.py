"""What an engine's late words do: nothing to a request that has ended, nor to a channel that broke."""

import asyncio
from contextlib import aclosing

import pytest
import zmq
import zmq.asyncio

from pregate.base.errors import DeadlineError
from pregate.router.link.client import EngineClient
from pregate.router.link.engine_health import EngineClientOptions
from pregate.router.link.messages import (
    CancelRequest,
    FailedEvent,
    FinishedEvent,
    Heartbeat,
    InfoReply,
    SamplingParams,
    SubmitRequest,
    TokensEvent,
)
from pregate.router.link.packet import pack, unpack
from pregate.workers.client.channel_options import ChannelOptions


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


async def unavailable_after_a_bug():
    context = zmq.Context()
    engine = zmq.asyncio.Context.shadow(context).socket(zmq.ROUTER)
    engine.bind("inproc://broken")
    client = EngineClient("inproc://broken", options=EngineClientOptions(keep_alive_s=0.01), context=context)
    client.open()
    peer, _ = await asyncio.wait_for(engine.recv_multipart(), 5)
    await engine.send_multipart([peer, pack([Heartbeat("e", 0, None, 0.0)])])
    while client.unavailable:
        await asyncio.sleep(0.01)
    client._running_ids.add(object())  # pyright: ignore[reportArgumentType] - the next keep-alive cannot be written
    while not client.unavailable:
        await asyncio.sleep(0.01)
    await engine.send_multipart([peer, pack([Heartbeat("e", 0, None, 0.0)])])
    await asyncio.sleep(0.1)
    found = client.unavailable
    await client.close()
    engine.close(linger=0)
    return found


async def told_after_a_deadline():
    """What the engine hears of a request whose deadline passed at the door."""
    context = zmq.Context()
    engine = zmq.asyncio.Context.shadow(context).socket(zmq.ROUTER)
    engine.bind("inproc://late-door")
    client = EngineClient("inproc://late-door", context=context)
    request = SubmitRequest("r", (1, 2), SamplingParams(max_tokens=4), deadline_s=0.1)
    try:
        with pytest.raises(DeadlineError):
            async for _ in client.generate(request):
                pass
        while True:
            _, packet = await asyncio.wait_for(engine.recv_multipart(), 5)
            if CancelRequest("r") in unpack(packet):
                return
    finally:
        await client.close()
        engine.close(linger=0)


def test_a_deadline_that_passes_at_the_door_cancels_the_request():
    asyncio.run(told_after_a_deadline())


async def cancelled_with_the_answer():
    """A caller that leaves in the moment in which its answer comes."""
    context = zmq.Context()
    engine = zmq.asyncio.Context.shadow(context).socket(zmq.ROUTER)
    engine.bind("inproc://crossing")
    client = EngineClient("inproc://crossing", context=context)
    asked = asyncio.ensure_future(client.info(timeout_s=5))
    while not client._waiting:
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    ((request_id, queue),) = client._waiting.items()
    queue.put_nowait(InfoReply(request_id, {}))
    asked.cancel()
    try:
        with pytest.raises(asyncio.CancelledError):
            await asked
    finally:
        await client.close()
        engine.close(linger=0)


def test_a_cancellation_is_not_lost_to_an_answer():
    asyncio.run(asyncio.wait_for(cancelled_with_the_answer(), 10))


def test_a_channel_that_broke_stays_broken():
    assert asyncio.run(asyncio.wait_for(unavailable_after_a_bug(), 10)) == "the channel to the engine broke"


def test_patience_with_the_dead_leaves_room_within_five_seconds():
    """A death is to be seen everywhere within 5 s, on a busy machine too: the clocks in a row may take 3.5 of them."""
    engine, host = EngineClientOptions(), ChannelOptions()
    assert engine.silence_s + engine.keep_alive_s <= 3.5
    assert host.host_timeout_s <= 3.5
