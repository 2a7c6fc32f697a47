"""The path service beside an engine, behind a front door: the same answers, and an end for every prompt."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import zmq

from pregate.base.errors import DeadlineError, UnavailableError
from pregate.model.checkpoint import CheckpointReader
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_computer import PathComputer
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient
from pregate.router.link.engine_health import EngineClientOptions
from pregate.router.link.loop_actor import LoopActor
from pregate.router.link.messages import (
    FailedEvent,
    Heartbeat,
    KeepAlive,
    RouteReply,
    RouteRequest,
    SamplingParams,
    SubmitRequest,
)
from pregate.router.link.packet import pack, unpack
from pregate.router.link.path_client import PathClient
from pregate.router.paths.actor import PathActor
from pregate.router.paths.load import load_router
from pregate.router.paths.options import PathOptions
from pregate.router.paths.prompts import Prompts
from pregate.router.paths.server import PathServer
from tests.equality import reference_texts
from tests.processes import PROCESSES
from tests.router.running import LoopThread, RawDoor, engine_thread, local_engine, wait_for

PROMPTS = [[1, *np.random.default_rng(n).integers(3, 200, n).tolist()] for n in (4, 30, 60)]


class SlowPrompts(Prompts):
    """Whose turns do not end a prompt."""

    def turn(self):
        time.sleep(0.02)
        waiting, now_s = self._prompts, self._clock()
        late = {k: p for k, p in waiting.items() if p.deadline_s is not None and p.deadline_s < now_s}
        self._prompts = dict(late)
        try:
            return super().turn()
        finally:
            self._prompts |= {k: p for k, p in waiting.items() if k not in late}


@contextmanager
def path_service(checkpoint, endpoint, kind=Prompts):
    reader = CheckpointReader(checkpoint)
    computer = PathComputer(load_router(reader))
    prompts = kind(computer, PathOptions(), reader.config.context_tokens, reader.fingerprint)
    server, stop = PathServer(prompts, endpoint), threading.Event()
    thread = threading.Thread(target=server.run, args=(stop,))
    thread.start()
    try:
        yield prompts
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def deaf_service(endpoint):
    """One that says it is there and takes prompts, and is gone before it answers; yields what it was told."""
    told, over = [], threading.Event()

    def run():
        with zmq.Context.instance().socket(zmq.ROUTER) as socket:
            socket.bind(endpoint)
            while not over.is_set():
                if socket.poll(20):
                    peer, packet = socket.recv_multipart()
                    told.extend(unpack(packet))
                    socket.send_multipart([peer, pack([Heartbeat("deaf", 0, None, 0.0)])])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield told
    finally:
        over.set()
        thread.join(30)


@contextmanager
def service(checkpoint, engine_endpoint, path_endpoint, **options):
    """A door's service; yields it with a way to run its coroutines. `options` are the path client's."""
    loop = LoopThread()
    paths = PathClient(path_endpoint, **options)
    found = DoorService(EngineClient(engine_endpoint), checkpoint, "tiny", path_client=paths)
    try:
        yield found, loop.call
    finally:
        loop.call(found.close())
        loop.close()


def test_texts_and_routes_equal_the_reference(tiny_path_checkpoint, endpoint, monkeypatch):
    references = reference_texts(RoutedForCausalLM.from_pretrained(tiny_path_checkpoint).eval(), PROMPTS, 12)
    sampling = SamplingParams(12, ignore_eos=True)
    with local_engine(tiny_path_checkpoint) as engine, engine_thread(engine, endpoint):
        routes = [engine.route(prompt).ids.tobytes() for prompt in PROMPTS]
        brought, submit = [], engine.submit
        monkeypatch.setattr(engine, "submit", lambda request: (brought.append(request.paths), submit(request)))
        monkeypatch.setattr(engine, "route", None)  # an engine is not asked any more
        with (
            path_service(tiny_path_checkpoint, endpoint + "p"),
            service(tiny_path_checkpoint, endpoint, endpoint + "p") as (door, call),
        ):

            async def all_at_once():
                return await asyncio.gather(*(door.complete(p, sampling, deadline_s=60) for p in PROMPTS))

            for completion, reference in zip(call(all_at_once()), references, strict=True):
                assert list(completion.token_ids) == reference.tokens
            assert len(brought) == len(PROMPTS) and None not in brought
            for prompt, reference in zip(PROMPTS, references, strict=True):  # the paths of what was generated come too
                known = reference.tokens[:5]
                resumed = call(door.complete(prompt, sampling, deadline_s=60, generated_ids=known))
                assert list(resumed.token_ids) == reference.tokens
            assert [call(door.route(prompt)).ids for prompt in PROMPTS] == routes
            info = call(door.model_info())
            assert info["num_waiting_for_paths"] == info["path_service"]["num_queued"] == 0
            assert info["path_service"]["num_turns"] >= len(PROMPTS)


def test_a_prompt_ends_by_its_deadline_or_by_being_left(tiny_path_checkpoint, endpoint, engine):
    with (
        engine_thread(engine, endpoint),
        path_service(tiny_path_checkpoint, endpoint + "p", SlowPrompts) as prompts,
        service(tiny_path_checkpoint, endpoint, endpoint + "p") as (door, call),
    ):
        with pytest.raises(DeadlineError):
            call(door.complete(PROMPTS[0], SamplingParams(2), deadline_s=0.3))
        wait_for(lambda: not len(prompts), what="the end of the late prompt")

        async def leave():
            task = asyncio.ensure_future(door.complete(PROMPTS[0], SamplingParams(2)))
            while not len(prompts):
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        call(leave())
        wait_for(lambda: not len(prompts), timeout_s=2, what="the end of the prompt that was left")
        assert not engine.has_work


@pytest.mark.parametrize("silence_s", [1.0, 30.0])
def test_prompts_of_a_service_that_is_lost_are_asked_of_the_next_one(tiny_path_checkpoint, endpoint, engine, silence_s):
    """Whether silence is what tells, or the next one, which is there before and knows nothing of them."""
    quick, sampling = EngineClientOptions(keep_alive_s=0.05, silence_s=silence_s), SamplingParams(4, ignore_eos=True)
    with (
        engine_thread(engine, endpoint),
        service(tiny_path_checkpoint, endpoint, endpoint + "p", options=quick) as (door, call),
        ThreadPoolExecutor(2) as pool,
    ):
        with path_service(tiny_path_checkpoint, endpoint + "p"):
            expected = call(door.complete(PROMPTS[0], sampling)).token_ids
        with deaf_service(endpoint + "p") as told:
            wait_for(lambda: told and door.unavailable is None, 20, "a service that says it is there")
            completion = pool.submit(call, door.complete(PROMPTS[0], sampling))
            route = pool.submit(call, door.route(PROMPTS[1]))
            wait_for(lambda: sum(isinstance(m, RouteRequest) for m in told) == 2, 20, "both prompts")
        if silence_s < 30:
            wait_for(lambda: "silent" in (door.unavailable or ""), 20, "the loss")
        with path_service(tiny_path_checkpoint, endpoint + "p"):
            assert completion.result(60).token_ids == expected
            assert route.result(60).token_ids == tuple(PROMPTS[1])


def test_who_serves_is_called_by_its_name(tiny_path_checkpoint, endpoint):
    """It was "the engine" that had been restarted, where it was the path service."""
    with path_service(tiny_path_checkpoint, endpoint), RawDoor(endpoint) as door:
        door.send(KeepAlive("door", ("a",)))
        assert "the path service does not know this request" in door.receive(FailedEvent).message


def test_it_generates_nothing(tiny_path_checkpoint, endpoint):
    with path_service(tiny_path_checkpoint, endpoint), RawDoor(endpoint) as door:
        door.send(SubmitRequest("a", (1,), SamplingParams(2)))
        assert "generates nothing" in door.receive(FailedEvent).message


def test_the_status_of_its_process_says_what_it_does(tiny_path_checkpoint, endpoint):
    """It said that a thread lives, and no more."""
    reader = CheckpointReader(tiny_path_checkpoint)
    computer, inside, go_on = PathComputer(load_router(reader)), threading.Event(), threading.Event()
    prompts = Prompts(computer, PathOptions(), reader.config.context_tokens, reader.fingerprint)
    turn, actor = prompts.turn, LoopActor("inproc://paths")
    prompts.turn = lambda: (inside.set(), go_on.wait(20), turn())[2]
    actor.serve(PathServer(prompts, endpoint), "paths")
    with RawDoor(endpoint) as door:
        door.send(RouteRequest("a", (1, 5, 6)))
        assert inside.wait(20)
        status = actor.status()
        assert (status["running"], status["busy_with"]) == (True, "the paths of 1 prompts")
        go_on.set()
        assert door.receive(RouteReply).request_id == "a"
        wait_for(lambda: actor.status()["busy_with"] is None, what="an idle path service")
    actor.stop()
    assert actor.status()["running"] is False


def run_actor(model, endpoint, ready):
    actor = PathActor(PathOptions(model), endpoint)
    ready.put(actor.start())
    threading.Event().wait(600)


def test_its_death_is_seen_within_five_seconds(tiny_path_checkpoint, endpoint, engine):
    """By those that wait, and by health."""
    ready = PROCESSES.Queue()
    process = PROCESSES.Process(target=run_actor, args=(str(tiny_path_checkpoint), endpoint + "p", ready), daemon=True)
    process.start()
    try:
        ready.get(timeout=120)
        with (
            engine_thread(engine, endpoint),
            service(tiny_path_checkpoint, endpoint, endpoint + "p", patience_s=0) as (door, call),
        ):
            assert len(call(door.complete(PROMPTS[0], SamplingParams(2, ignore_eos=True))).token_ids) == 2
            assert door.unavailable is None
            process.kill()
            killed_s = time.monotonic()
            with pytest.raises(UnavailableError, match="the path service has been silent for"):
                call(door.complete(PROMPTS[0], SamplingParams(2)))
            assert time.monotonic() - killed_s < 5.5  # half a second of it is this machine's
            assert "the path service" in (door.unavailable or "")
            with pytest.raises(UnavailableError, match="the path service"):
                call(door.route(PROMPTS[0]))
            info = call(door.model_info())  # the engine's answer, with why there are no paths
            assert "silent for" in info["path_service"]["unavailable"] and info["num_waiting_for_paths"] == 0
    finally:
        process.kill()
        process.join(10)
