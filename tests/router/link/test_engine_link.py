"""The link and the compute thread: liveness, overload and isolation, however long a step takes, whatever comes in."""

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgpack
import pytest

from pregate.base.errors import HostLostError, PregateError, UnavailableError
from pregate.router.link.client import EngineClient
from pregate.router.link.engine_health import EngineClientOptions
from pregate.router.link.link import LinkOptions
from pregate.router.link.loop_actor import LoopActor
from pregate.router.link.messages import (
    CancelRequest,
    FailedEvent,
    FinishedEvent,
    Heartbeat,
    InfoReply,
    InfoRequest,
    KeepAlive,
    RouteReply,
    RouteRequest,
    SamplingParams,
    SubmitRequest,
    TokensEvent,
)
from pregate.router.link.packet import PROTOCOL_VERSION
from pregate.router.link.server import EngineServer, EngineServerOptions
from tests.router.running import (
    PROMPT,
    QUICK,
    LoopThread,
    RawDoor,
    engine_thread,
    local_engine,
    socket_folder,
    wait_for,
)

LONG = SamplingParams(max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


class Gate:
    """Holds the engine inside its steps while closed, and notes what the compute thread does."""

    def __init__(self, engine, monkeypatch):
        self.open, self.inside, self.calls = threading.Event(), threading.Event(), []
        step, submit = engine.step, engine.submit

        def held():
            self.calls.append("step")
            self.inside.set()
            assert self.open.wait(30)
            return step()

        def noted(request):
            self.calls.append(request.request_id)
            submit(request)

        monkeypatch.setattr(engine, "step", held)
        monkeypatch.setattr(engine, "submit", noted)


@pytest.fixture
def gate(engine, monkeypatch):
    gate = Gate(engine, monkeypatch)
    yield gate
    gate.open.set()


def test_a_step_that_outlasts_every_patience_is_busy_not_dead(engine, endpoint, gate):
    loop, quick = LoopThread(), EngineClientOptions(keep_alive_s=0.05, silence_s=0.4)
    client, events = EngineClient(endpoint, options=quick), []

    async def generate():
        events.extend([event async for event in client.generate(SubmitRequest("a", PROMPT, SHORT))])

    with engine_thread(engine, endpoint, QUICK):
        caller = threading.Thread(target=lambda: loop.call(generate()))
        caller.start()
        assert gate.inside.wait(20)
        for _ in range(10):
            time.sleep(0.15)
            assert client.unavailable is None
            info = loop.call(client.info())
        assert info["busy_with"] == "a step" and info["busy_s"] > 0.5
        gate.open.set()
        caller.join(20)
        assert isinstance(events[-1], FinishedEvent)
        assert sum(len(e.token_ids) for e in events if isinstance(e, TokensEvent)) == 3
        loop.call(client.close())
    loop.close()


def test_the_status_of_its_process_says_what_it_does_and_why_it_refuses(engine, endpoint, gate, monkeypatch):
    """It said that a thread lives, and no more."""
    actor = LoopActor("inproc://engine")
    assert actor.status()["running"] is False
    actor.serve(EngineServer(engine, endpoint, options=QUICK), "engine")
    with RawDoor(endpoint) as door:
        door.send(SubmitRequest("a", PROMPT, SHORT))
        assert gate.inside.wait(20)
        status = actor.status()
        assert (status["running"], status["busy_with"], status["unavailable"]) == (True, "a step", None)

        def lost(*_arguments):
            raise HostLostError(1, "silent for 3.0 s")

        monkeypatch.setattr(engine.runner, "run", lost)
        monkeypatch.setattr(engine.exchange, "poll", lost)
        gate.open.set()
        assert door.receive(FailedEvent).request_id == "a"
        status = actor.status()
        assert status["running"]
        assert status["unavailable"] == "expert host 1 is lost: silent for 3.0 s"
        monkeypatch.setattr(engine, "idle", lambda: 1 / 0)
        wait_for(lambda: not actor.status()["running"], what="the end of the loop by a bug")
        assert actor.status()["unavailable"] == "internal error in the engine"
    actor.stop()


STOPPABLE = """
import sys
from pathlib import Path
from pregate.router.link.link import LinkOptions
from pregate.router.link.server import EngineServerOptions
from tests.router.running import PROMPT, QUICK, engine_thread, local_engine
options = EngineServerOptions(LinkOptions(heartbeat_s=0.1, peer_silence_s=1.0))
with local_engine(Path(sys.argv[1])) as engine, engine_thread(engine, sys.argv[2], options):
    sys.stdin.read()
"""


def test_a_stopped_engine_is_waited_for_and_a_killed_one_is_not(tiny_path_checkpoint):
    """Neither side counts the silence of a process that got no time; the system tells of one that died."""
    loop, quick, num_new = LoopThread(), EngineClientOptions(keep_alive_s=0.05, silence_s=0.4), 200
    many = SamplingParams(max_tokens=num_new, ignore_eos=True)
    with socket_folder() as folder:
        endpoint = f"ipc://{folder}/e"
        command = [sys.executable, "-c", STOPPABLE, tiny_path_checkpoint, endpoint]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).resolve().parents[3])
        client, events = EngineClient(endpoint, options=quick), []

        async def generate(name):
            events.clear()
            async for event in client.generate(SubmitRequest(name, PROMPT, many)):
                events.append(event)

        async def opened():
            client.open()

        try:
            loop.call(opened())
            wait_for(lambda: client.unavailable is None, 60, "the engine")
            answer = asyncio.run_coroutine_threadsafe(generate("a"), loop.loop)
            wait_for(lambda: events, 20, "the first token")
            process.send_signal(signal.SIGSTOP)
            time.sleep(2)  # longer than any patience but that with a stopped process
            assert client.unavailable is None
            assert not answer.done()
            process.send_signal(signal.SIGCONT)
            answer.result(60)
            assert isinstance(events[-1], FinishedEvent)
            assert sum(len(e.token_ids) for e in events if isinstance(e, TokensEvent)) == num_new
            answer = asyncio.run_coroutine_threadsafe(generate("b"), loop.loop)
            wait_for(lambda: events, 20, "the first token")
            process.kill()
            with pytest.raises(UnavailableError, match="silent"):
                answer.result(5)
            loop.call(client.close())
        finally:
            process.kill()
            process.wait(20)
    loop.close()


def test_while_a_step_runs_doors_are_answered_and_the_queue_is_bounded(engine, endpoint, gate):
    options = EngineServerOptions(LinkOptions(heartbeat_s=0.05, max_pending_requests=4))
    with engine_thread(engine, endpoint, options), RawDoor(endpoint) as door:
        door.send(SubmitRequest("first", PROMPT, SHORT))
        assert gate.inside.wait(20)
        for i in range(6):
            door.send(SubmitRequest(f"r{i}", PROMPT, SHORT))
        for refused in ("r4", "r5"):
            failed = door.receive(FailedEvent)
            assert (failed.request_id, failed.code) == (refused, "RESOURCE_EXHAUSTED")
        door.send(CancelRequest("r0"), SubmitRequest("r6", PROMPT, SHORT), InfoRequest("i"))
        info = door.receive(InfoReply).info
        assert (info["num_queued"], info["busy_with"]) == (1 + 4, "a step"), "the first is the step's"
        beats = [door.receive(Heartbeat) for _ in range(3)]
        assert {beat.busy_with for beat in beats} == {"a step"}
        assert beats[0].busy_s < beats[-1].busy_s
        gate.open.set()
        ended = {door.receive(FinishedEvent).request_id for _ in range(5)}
        assert ended == {"first", "r1", "r2", "r3", "r6"}
    assert "r0" not in gate.calls


def test_between_two_steps_few_prompts_are_taken(engine, endpoint, gate):
    options = EngineServerOptions(prompt_tokens_per_turn=100)
    with engine_thread(engine, endpoint, options), RawDoor(endpoint) as door:
        door.send(SubmitRequest("stream", PROMPT, LONG))
        assert gate.inside.wait(20)
        burst: list[SubmitRequest | RouteRequest] = [SubmitRequest(f"b{i}", (5,) * 40, SHORT) for i in range(12)]
        burst.insert(4, RouteRequest("long", (5,) * 250))
        for request in burst:
            door.send(request)
        wait_for(lambda: engine_queue(door) == 1 + len(burst), what="the burst in the queue")
        gate.calls.clear()
        gate.open.set()
        assert door.receive(RouteReply).request_id == "long"
        while door.receive(FinishedEvent).request_id != "b11":
            pass
        door.send(CancelRequest("stream"))
    turns = "".join("|" if call == "step" else "b" for call in gate.calls).split("|")
    assert sum(map(len, turns)) == 12
    assert max(map(len, turns)) == 2, "40 + 40 of 100 tokens; a longer one comes alone"


def test_who_finds_the_queue_full_is_told_before_the_next_step(path_checkpoint, endpoint, monkeypatch):
    """However few prompts are taken between two steps: else as many waited as the link holds, whatever the bound."""
    with local_engine(path_checkpoint, max_running=1, max_queued=2) as engine:
        gate, options = Gate(engine, monkeypatch), EngineServerOptions(prompt_tokens_per_turn=1)
        with engine_thread(engine, endpoint, options), RawDoor(endpoint) as door:
            door.send(SubmitRequest("first", PROMPT, LONG))
            assert gate.inside.wait(20)
            for number in range(30):
                door.send(SubmitRequest(f"b{number}", PROMPT, SHORT))
            wait_for(lambda: engine_queue(door) == 1 + 30, what="all of them in the queue")
            gate.calls.clear()
            gate.open.set()
            refused = [door.receive(FailedEvent) for _ in range(28)]
            assert {event.code for event in refused} == {"RESOURCE_EXHAUSTED"}
            door.send(CancelRequest("first"))
            assert {door.receive(FinishedEvent).request_id for _ in range(2)} == {"b0", "b1"}
    before = gate.calls[: gate.calls.index("b29")]
    assert before.count("step") == 2, "one is taken a step until the queue is full, then all"


def engine_queue(door):
    door.send(InfoRequest("i"))
    return door.receive(InfoReply).info["num_queued"]


def test_a_request_whose_deadline_passes_in_a_long_step_ends_then(engine, endpoint, gate):
    loop, client = LoopThread(), EngineClient(endpoint)

    async def generate():
        return [e async for e in client.generate(SubmitRequest("a", PROMPT, SHORT, deadline_s=0.3))]

    with engine_thread(engine, endpoint), RawDoor(endpoint) as door:
        door.send(SubmitRequest("first", PROMPT, SHORT))
        assert gate.inside.wait(20)
        with pytest.raises(PregateError, match="deadline") as error:
            loop.call(generate(), 20)
        assert error.value.code == "DEADLINE_EXCEEDED"
        gate.open.set()
        door.receive(FinishedEvent)
        loop.call(client.close())
    loop.close()


def test_a_failed_step_ends_its_own_requests_and_the_engine_goes_on(engine, endpoint, monkeypatch):
    forward = engine.runner.run

    def fails(number, step, paths):
        if any(piece.sequence.request_id == "bad" for piece in step):
            raise PregateError("expert host 0: out of memory")
        return forward(number, step, paths)

    monkeypatch.setattr(engine.runner, "run", fails)
    with engine_thread(engine, endpoint, QUICK), RawDoor(endpoint) as door:
        door.send(SubmitRequest("bad", PROMPT, SHORT))
        assert door.receive(FailedEvent) == FailedEvent("bad", "INTERNAL", "expert host 0: out of memory")
        door.send(SubmitRequest("good", PROMPT, SHORT))
        assert door.receive(FinishedEvent).request_id == "good"
        assert door.receive(Heartbeat).unavailable is None
    assert not engine.has_work


def test_the_end_of_the_loop_by_a_bug_is_told_at_once(engine, endpoint, monkeypatch):
    monkeypatch.setattr(engine, "idle", lambda: 1 // 0)
    loop, client = LoopThread(), EngineClient(endpoint)
    server, errors = EngineServer(engine, endpoint, options=QUICK), []
    loop.call(_opened(client))

    def run():
        try:
            server.run(threading.Event())
        except ZeroDivisionError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert len(errors) == 1
    wait_for(lambda: "internal error" in (client.unavailable or ""), 5, "word of the end")  # after a beat before it
    with pytest.raises(UnavailableError):
        loop.call(client.info(timeout_s=5.0))
    loop.call(client.close())
    loop.close()


def test_the_end_of_the_io_thread_by_a_bug_ends_the_loop_with_that_reason(engine, endpoint, monkeypatch):
    server = EngineServer(engine, endpoint, options=QUICK)
    monkeypatch.setattr(server._link, "_send_heartbeats", lambda: 1 // 0)
    with pytest.raises(PregateError, match="link to the front doors broke"):
        server.run(threading.Event())


async def _opened(client):
    client.open()


def test_messages_of_a_door_that_has_gone_do_not_end_the_loop(engine, endpoint):
    """Each packet's first message is answered, which finds the door gone, before its second is looked at."""
    with engine_thread(engine, endpoint), RawDoor(endpoint) as door:
        for _ in range(30):
            with RawDoor(endpoint) as leaving:
                leaving.send(
                    InfoRequest("i"), SubmitRequest("a", PROMPT, SHORT), KeepAlive("d", ("x",)), InfoRequest("j")
                )
        door.send(SubmitRequest("b", PROMPT, SHORT))
        assert door.receive(FinishedEvent).request_id == "b"


def test_nothing_that_arrives_ends_the_loop(engine, endpoint):
    rng = random.Random(20)
    with engine_thread(engine, endpoint, QUICK), RawDoor(endpoint) as door:
        doors = [RawDoor(endpoint) for _ in range(4)]
        for _ in range(600):
            number = rng.randrange(len(doors))
            doors[number].socket.send_multipart([_any_packet(rng) for _ in range(rng.randrange(1, 4))])
            if rng.random() < 0.05:
                doors[number].close()
                doors[number] = RawDoor(endpoint)
        door.send(SubmitRequest("b", PROMPT, SHORT))
        assert door.receive(FinishedEvent).request_id == "b"
        for leaving in doors:
            leaving.close()
        wait_for(lambda: not engine.has_work, 20, "an idle engine")


def _any_packet(rng):
    ids = ["a", "b" * 200, "", "c", "ä"]
    numbers = [0, -1, 1 << 40, (1 << 64) - 1, 5, 0.5, float("nan"), None, True, "5", [], [5, -5, 1 << 63], {}]
    sampling = {
        "max_tokens": 2,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": None,
        "stop_token_ids": [],
        "ignore_eos": True,
    }
    none = {"paths": None, "path_state": None}
    kinds = {
        "submit": {"token_ids": [5, 6], "sampling": sampling, "deadline_s": None, "cache_salt": "", **none},
        "route": {"token_ids": [5, 6], "deadline_s": None, "with_state": False},
        "info": {},
        "cancel": {},
        "keep_alive": {"sender": "d", "request_ids": ["a", "x"]},
        "tokens": {"token_ids": [1]},
        "heartbeat": {"sender": "e", "progress": 1, "busy_with": None, "busy_s": 0.0, "unavailable": None},
        "failed": {"code": "INTERNAL", "message": "m"},
    }
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(40))
    messages = []
    for _ in range(rng.randrange(4)):
        kind = rng.choice(list(kinds))
        fields = {"kind": kind, **kinds[kind]}
        if kind not in ("keep_alive", "heartbeat"):
            fields["request_id"] = rng.choice(ids)
        if rng.random() < 0.4:
            fields[rng.choice(list(fields))] = rng.choice(numbers)
        if kind == "submit" and rng.random() < 0.3:
            fields["sampling"] = {**sampling, rng.choice(list(sampling)): rng.choice(numbers)}
        messages.append(fields)
    packet = bytes(msgpack.packb({"version": PROTOCOL_VERSION, "messages": messages}) or b"")
    return packet[: rng.randrange(len(packet))] if rng.random() < 0.1 else packet
