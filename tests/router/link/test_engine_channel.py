"""The channel between doors and an engine: every request ends once, whatever either side does."""

import stat
import threading
import time

import numpy as np
import pytest
import zmq

from pregate.base.errors import UnavailableError, UserError
from pregate.router.link.client import EngineClient
from pregate.router.link.link import LinkOptions
from pregate.router.link.messages import (
    CancelRequest,
    FailedEvent,
    FinishedEvent,
    InfoReply,
    InfoRequest,
    KeepAlive,
    RouteReply,
    RouteRequest,
    SamplingParams,
    SubmitRequest,
    TokensEvent,
)
from pregate.router.link.server import EngineServer, EngineServerOptions
from tests.router.running import PROMPT, LoopThread, RawDoor, engine_thread, socket_folder, wait_for

LONG = SamplingParams(max_tokens=240, ignore_eos=True)
SHORT = SamplingParams(max_tokens=40, ignore_eos=True)


@pytest.fixture
def slow(engine, monkeypatch):
    """The same steps, each 40 ms later, so that a test can act in between on a busy machine, too."""
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.04), step())[1], raising=False)
    return engine


@pytest.fixture
def raw(endpoint):
    doors = []

    def connect():
        doors.append(RawDoor(endpoint))
        return doors[-1]

    yield connect
    for door in doors:
        door.close()


def test_garbage_is_answered_and_harms_nobody(engine, endpoint, raw):
    with engine_thread(engine, endpoint):
        door, other = raw(), raw()
        other.send(SubmitRequest("a", PROMPT, SHORT))
        door.socket.send(b"\x00garbage")
        failed = door.receive(FailedEvent)
        assert (failed.request_id, failed.code) == ("", "INTERNAL")
        assert "msgpack" in failed.message
        door.send(InfoRequest("i"))
        assert door.receive(InfoReply).info["vocab_size"] == 512
        assert other.receive(FinishedEvent).completion_tokens == 40


def test_doors_get_their_own_events_only(engine, endpoint, raw):
    with engine_thread(engine, endpoint):
        doors = [raw() for _ in range(3)]
        for i, door in enumerate(doors):
            door.send(SubmitRequest(f"r{i}", (*PROMPT, 10 + i), SHORT))
        for i, door in enumerate(doors):
            counted = 0
            while counted < 40:
                event = door.receive(TokensEvent)
                assert event.request_id == f"r{i}"
                counted += len(event.token_ids)


def test_a_foreign_request_can_be_neither_taken_over_nor_cancelled(slow, endpoint, raw):
    with engine_thread(slow, endpoint):
        owner, other = raw(), raw()
        owner.send(SubmitRequest("mine", PROMPT, SHORT))
        owner.receive(TokensEvent)
        other.send(CancelRequest("mine"), SubmitRequest("mine", PROMPT, SHORT))
        assert "is running already" in other.receive(FailedEvent).message
        assert owner.receive(FinishedEvent).completion_tokens == 40


def test_refusals_carry_code_and_sentence(engine, endpoint, raw):
    with engine_thread(engine, endpoint):
        door = raw()
        door.send(SubmitRequest("a", (), LONG))
        assert door.receive(FailedEvent) == FailedEvent(
            "a", "INVALID_ARGUMENT", "prompt of 0 tokens: must hold 1 to 255 tokens"
        )
        door.send(SubmitRequest("b", PROMPT, SamplingParams(max_tokens=0)))
        assert door.receive(FailedEvent).message == "max_tokens 0: must be at least 1"


def test_route_reply_holds_the_paths(engine, endpoint, raw):
    with engine_thread(engine, endpoint):
        door = raw()
        door.send(RouteRequest("r", PROMPT))
        reply = door.receive(RouteReply)
        paths = engine.route(PROMPT)
        found = reply.paths.slice(0, reply.paths.num_tokens)
        assert np.array_equal(found.ids, paths.ids)
        assert found.exact


@pytest.mark.parametrize("how", ["cancels", "closes", "falls silent", "stops listing it"])
def test_a_door_that_gives_a_request_up_frees_it(slow, endpoint, raw, how):
    options = EngineServerOptions(LinkOptions(heartbeat_s=0.1, peer_silence_s=0.4))
    with engine_thread(slow, endpoint, options):
        door = raw()
        door.send(SubmitRequest("a", PROMPT, LONG))
        door.receive(TokensEvent)
        assert slow.has_work
        before = slow.info()["num_steps"]
        if how == "cancels":
            door.send(CancelRequest("a"))
        elif how == "closes":
            door.close()
        elif how == "stops listing it":
            door.send(KeepAlive("door", ()))
        wait_for(lambda: not slow.has_work, 20, "an idle engine")
        assert slow.info()["num_steps"] - before < 200, "it ended by the cancel, not because it was done"


def test_a_door_that_lists_its_request_keeps_it(slow, endpoint, raw):
    options = EngineServerOptions(LinkOptions(heartbeat_s=0.1, peer_silence_s=0.5))
    with engine_thread(slow, endpoint, options):
        door = raw()
        door.send(SubmitRequest("a", PROMPT, SamplingParams(max_tokens=100, ignore_eos=True)))
        finished = None
        while finished is None:
            door.send(KeepAlive("door", ("a",)))
            finished = door.look(FinishedEvent, 0.1)
        assert finished.completion_tokens == 100


def test_a_request_the_engine_does_not_know_is_failed(engine, endpoint, raw):
    with engine_thread(engine, endpoint):
        door = raw()
        door.send(KeepAlive("door", ("gone",)))
        failed = door.receive(FailedEvent)
        assert (failed.request_id, failed.code) == ("gone", "UNAVAILABLE")


def test_stopping_fails_what_runs(slow, endpoint, raw):
    with engine_thread(slow, endpoint) as stop:
        door = raw()
        door.send(SubmitRequest("a", PROMPT, LONG))
        door.receive(TokensEvent)
        stop.set()
        assert door.receive(FailedEvent) == FailedEvent("a", "UNAVAILABLE", "the engine is stopping")
    assert not slow.has_work


def test_a_bug_in_a_step_is_told_and_ends_the_loop(engine, endpoint, raw, monkeypatch):
    def step():
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(engine, "step", step)
    server, caught = EngineServer(engine, endpoint), []

    def run():
        try:
            server.run(threading.Event())
        except ZeroDivisionError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    door = raw()
    door.send(SubmitRequest("a", PROMPT, LONG))
    assert door.receive(FailedEvent) == FailedEvent("a", "INTERNAL", "internal error in the engine")
    thread.join(10)
    assert len(caught) == 1
    assert not engine.has_work


def test_the_socket_file_is_private_and_removed(engine):
    with socket_folder() as folder:
        file = folder / "new" / "engine.sock"
        with engine_thread(engine, f"ipc://{file}"):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        assert not file.exists()


@pytest.mark.parametrize("bad", ["tcp://127.0.0.1:5555", "ipc://", "engine.sock", "ipc:///tmp/" + "x" * 100])
def test_other_endpoints_are_refused(engine, bad):
    with pytest.raises(UserError, match="engine endpoint"):
        EngineServer(engine, bad)
    with pytest.raises(UserError, match="engine endpoint"):
        EngineClient(bad)


def test_client_and_engine_in_one_process(engine):
    context, loop = zmq.Context(), LoopThread()
    with engine_thread(engine, "inproc://engine", context=context):
        client = EngineClient("inproc://engine", context=context)

        async def generate():
            return [event async for event in client.generate(SubmitRequest("a", PROMPT, LONG))]

        events = loop.call(generate())
        assert loop.call(client.info())["routing"] == "path"
        assert isinstance(events[-1], FinishedEvent)
        assert sum(len(e.token_ids) for e in events if isinstance(e, TokensEvent)) == 240
        assert client.unavailable is None
        loop.call(client.close())
        with pytest.raises(UnavailableError, match="closing"):
            loop.call(client.info())
    loop.close()
    context.term()


def test_client_raises_the_error_of_the_code(engine, endpoint):
    loop = LoopThread()
    with engine_thread(engine, endpoint):
        client = EngineClient(endpoint)

        async def generate():
            return [e async for e in client.generate(SubmitRequest("a", (), LONG))]

        with pytest.raises(UserError, match="must hold 1 to 255 tokens"):
            loop.call(generate())
        loop.call(client.close())
    loop.close()
