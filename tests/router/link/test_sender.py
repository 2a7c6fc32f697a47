"""What a front door says to an engine that does not read: it waits, bounded in bytes, until who asked gives up."""

import asyncio
from contextlib import aclosing

import zmq
import zmq.asyncio

from pregate.base.errors import DeadlineError, QueueFullError
from pregate.router.link.client import EngineClient
from pregate.router.link.engine_health import EngineClientOptions
from pregate.router.link.messages import CancelRequest, FinishedEvent, SamplingParams, SubmitRequest
from pregate.router.link.packet import pack, unpack

SHORT = SamplingParams(max_tokens=3)


def stopped(endpoint: str) -> zmq.asyncio.Socket:
    """An engine's socket that nobody reads for now."""
    socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.bind(endpoint)
    return socket


async def end(client: EngineClient, request: SubmitRequest) -> Exception | FinishedEvent:
    """How a request ends."""
    try:
        async with aclosing(client.generate(request)) as stream:
            return [event async for event in stream if isinstance(event, FinishedEvent)][-1]
    except Exception as error:  # noqa: BLE001 - whatever it is, it is compared
        return error


async def waves(endpoint: str) -> None:
    engine, client = stopped(endpoint), EngineClient(endpoint, options=EngineClientOptions(silence_s=60))
    try:
        patient = asyncio.ensure_future(end(client, SubmitRequest("patient", (1,) * 40, SHORT, 60.0)))
        for wave in range(4):  # each leaves something to be read, where it is sent
            late = [SubmitRequest(f"{wave}-{n}", (1,) * 40, SHORT, 0.2) for n in range(800)]
            ends = await asyncio.gather(*(end(client, request) for request in late))
            assert {type(one) for one in ends} == {DeadlineError}
        last = asyncio.ensure_future(end(client, SubmitRequest("last", (1,), SHORT, 60.0)))
        seen = []
        while not (seen and seen[-1] == SubmitRequest("last", (1,), SHORT, 60.0)):
            peer, packet = await asyncio.wait_for(engine.recv_multipart(), 20)
            seen += [message for message in unpack(packet) if isinstance(message, (SubmitRequest, CancelRequest))]
        submitted = {message.request_id for message in seen if isinstance(message, SubmitRequest)}
        cancelled = {message.request_id for message in seen if isinstance(message, CancelRequest)}
        assert cancelled == submitted - {"patient", "last"}, "of those that were sent, and no others"
        for name in ("patient", "last"):
            await engine.send_multipart([peer, pack([FinishedEvent(name, "length", 1, 3, (0,))])])
        assert isinstance(await asyncio.wait_for(patient, 20), FinishedEvent)
        assert isinstance(await asyncio.wait_for(last, 20), FinishedEvent)
    finally:
        await client.close()
        engine.close(linger=0)


def test_deadlines_at_an_engine_that_stands_still_leave_nothing_that_others_are_refused_for(endpoint):
    """After some thousand packets every request was refused at once, whatever its deadline."""
    asyncio.run(asyncio.wait_for(waves(endpoint), 120))


async def too_many_bytes(endpoint: str) -> None:
    engine = stopped(endpoint)
    options = EngineClientOptions(silence_s=60, max_unsent_bytes=5 << 20)
    client = EngineClient(endpoint, options=options)
    try:
        large = [SubmitRequest(str(n), (1 << 30,) * 200_000, SHORT, 60.0) for n in range(60)]  # 1 MB each
        running = {asyncio.ensure_future(end(client, request)) for request in large}
        refused, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for one in [task.result() for task in refused]:
            assert isinstance(one, QueueFullError)
            assert "the engine reads no messages" in str(one) and f"at most {5 << 20} may" in str(one)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        after = asyncio.ensure_future(end(client, large[0]))
        done, _ = await asyncio.wait({after}, timeout=0.5)
        assert not done, "who gave up has made room"
        after.cancel()
        await asyncio.gather(after, return_exceptions=True)
    finally:
        await client.close()
        engine.close(linger=0)


def test_what_waits_to_be_sent_is_bounded_in_bytes(endpoint):
    asyncio.run(asyncio.wait_for(too_many_bytes(endpoint), 60))
