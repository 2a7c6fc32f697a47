"""What /health, /ready and a request say in each state of a door: the table of docs/serve.md, row by row."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from pregate.base.errors import HostLostError
from pregate.router.doors.openai_app import build_app
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient, EngineClientOptions
from tests.router.doors.test_openai_app import HttpServer
from tests.router.running import engine_thread, local_engine, socket_folder, wait_for

FAST = EngineClientOptions(keep_alive_s=0.05, silence_s=0.5, frozen_s=0.5)


@pytest.fixture(scope="module")
def engine(tiny_path_checkpoint):
    with local_engine(tiny_path_checkpoint, max_running=1, max_queued=1) as engine:
        yield engine


@contextmanager
def serving(endpoint, folder, options=FAST):
    """An HTTP door, its service and a client of it."""
    service = DoorService(EngineClient(endpoint, options=options), folder, "tiny")
    server = HttpServer(build_app(service))
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client, service
    server.close()


def says(client):
    """(/health, /ready)."""
    return client.get("/health").status_code, client.get("/ready").status_code


def ask(client, max_tokens=1):
    body = {"prompt": "O wind", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return client.post("/v1/completions", json=body)


def test_from_the_start_over_the_loss_of_the_engine_to_its_return(engine, tiny_path_checkpoint):
    with socket_folder() as folder:
        endpoint = f"ipc://{folder}/e"
        patient = EngineClientOptions(keep_alive_s=0.05, silence_s=5.0, frozen_s=5.0)
        with serving(endpoint, tiny_path_checkpoint, patient) as (client, _):
            assert says(client) == (200, 503), "warming up: the engine has not answered yet"
        with serving(endpoint, tiny_path_checkpoint) as (client, _):
            with engine_thread(engine, endpoint):
                wait_for(lambda: client.get("/ready").status_code == 200, what="the first token")
                assert says(client) == (200, 200)
                assert ask(client).status_code == 200
            wait_for(lambda: says(client) == (503, 503), what="the loss of the engine")
            assert ask(client).status_code == 503
            assert "silent" in client.get("/health").json()["status"]
            with engine_thread(engine, endpoint):
                wait_for(lambda: says(client) == (200, 200), what="its return")
                assert ask(client).status_code == 200


def test_no_door_is_ready_before_a_token_was_generated(engine, tiny_path_checkpoint, monkeypatch):
    """An engine that answers pings and computes nothing."""
    monkeypatch.setattr("pregate.router.doors.service._PROOF_S", 0.3)
    stuck, step = threading.Event(), engine.step
    monkeypatch.setattr(engine, "step", lambda: (stuck.wait(20), step())[1], raising=False)
    with (
        socket_folder() as folder,
        engine_thread(engine, f"ipc://{folder}/e"),
        serving(f"ipc://{folder}/e", tiny_path_checkpoint) as (client, service),
    ):
        wait_for(lambda: client.get("/v1/models").status_code == 200, what="the engine")
        try:
            assert service.unavailable is None
            assert says(client) == (200, 503)
            assert "no token could be generated" in client.get("/ready").json()["status"]
        finally:
            stuck.set()
        wait_for(lambda: client.get("/ready").status_code == 200, what="a token")


def test_a_long_step_and_a_full_queue_are_no_reason_to_go_elsewhere(engine, tiny_path_checkpoint, monkeypatch):
    release, step = threading.Event(), engine.step
    with (
        socket_folder() as folder,
        engine_thread(engine, f"ipc://{folder}/e"),
        serving(f"ipc://{folder}/e", tiny_path_checkpoint) as (client, _),
    ):
        wait_for(lambda: client.get("/ready").status_code == 200, what="the first token")
        monkeypatch.setattr(engine, "step", lambda: (release.wait(20), step())[1], raising=False)
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(ask(client, 4).status_code)) for _ in range(6)]
        try:
            threads[0].start()
            time.sleep(1.0)  # twice as long as silence may last
            assert says(client) == (200, 200), "a step takes long"
            for thread in threads[1:]:
                thread.start()
            time.sleep(0.3)
            assert says(client) == (200, 200), "the queue is full"
        finally:
            release.set()
        for thread in threads:
            thread.join(20)
        assert set(answers) == {200, 429}
        assert says(client) == (200, 200)


def test_a_host_that_is_away_or_a_drain_sends_requests_elsewhere(engine, tiny_path_checkpoint, monkeypatch):
    with (
        socket_folder() as folder,
        engine_thread(engine, f"ipc://{folder}/e"),
        serving(f"ipc://{folder}/e", tiny_path_checkpoint) as (client, service),
    ):
        wait_for(lambda: client.get("/ready").status_code == 200, what="the first token")

        def lost():
            raise HostLostError(1, "it is silent")

        monkeypatch.setattr(engine, "idle", lost)
        wait_for(lambda: says(client) == (200, 503), what="the loss of a host")
        assert "expert host 1 is lost" in client.get("/ready").json()["status"]
        assert ask(client).status_code == 503
        monkeypatch.undo()
        wait_for(lambda: says(client) == (200, 200), what="its return")
        service._draining = True  # `drain` says so first, and then waits
        assert says(client) == (200, 503)
        assert ask(client).json()["error"] == {
            "message": "the server is draining",
            "type": "service_unavailable_error",
            "param": None,
            "code": "unavailable",
        }
