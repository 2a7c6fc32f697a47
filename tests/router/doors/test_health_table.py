"""What /health, /ready, gRPC's health and a request say in each state of a deployment: the table of docs/operate.md.

With WRITE_DOCS set the table is written there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from pregate import Client
from pregate.base.errors import DeadlineError, HostLostError, PregateError
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.router.doors.openai_app import build_app
from pregate.router.doors.service import DoorService, ServiceOptions
from pregate.router.link.client import EngineClient
from pregate.router.link.engine_health import EngineClientOptions
from pregate.router.link.messages import SamplingParams, SubmitRequest
from tests.router.doors.test_openai_app import HttpServer
from tests.router.running import Door, RawDoor, door, engine_thread, local_engine, socket_folder, wait_for
from tests.router.serving import engine_of, hosts_here

FAST = EngineClientOptions(keep_alive_s=0.05, silence_s=0.5, frozen_s=0.5)
PATIENT = EngineClientOptions(keep_alive_s=0.05, silence_s=60.0, frozen_s=60.0)
DOCS = Path(__file__).resolve().parents[3] / "docs" / "operate.md"
HEAD = (
    "",
    "`/health`",
    "`/ready`",
    'gRPC health of `""`',
    "of `pregate.v1.Pregate`",
    "an HTTP request",
    "a gRPC request",
)
#: How long a request may take before it is said to wait.
WAITS_S = 1.0


class Doors:
    """An HTTP door and a gRPC door of one engine."""

    def __init__(self, http: httpx.Client, service: DoorService, front: Door) -> None:
        self.http, self.service, self.front = http, service, front

    def says(self) -> tuple[str, ...]:
        """/health, /ready, liveness, readiness."""
        codes = [str(self.http.get(path).status_code) for path in ("/health", "/ready")]
        return (*codes, *("SERVING" if self.front.client.health(s) else "NOT_SERVING" for s in ("", NAME)))

    def reaches(self, *wanted: str) -> None:
        """Wait until it says so: a door hears of its engine with a heartbeat."""
        wait_for(lambda: self.says() == wanted, 30, str(wanted))

    def asked(self) -> tuple[str, str]:
        """What becomes of a request at each door."""
        body = {"prompt": "O wind", "max_tokens": 1, "temperature": 0}
        try:
            http = str(self.http.post("/v1/completions", json=body, timeout=WAITS_S).status_code)
        except httpx.ReadTimeout:
            http = "waits"
        with Client(self.front.target, timeout_s=WAITS_S, retry_s=0) as client:
            try:
                client.complete("O wind", 1)
                grpc = "OK"
            except DeadlineError:
                grpc = "waits"
            except PregateError as error:
                grpc = error.code
        return http, grpc


NAME = "pregate.v1.Pregate"


@contextmanager
def doors(
    endpoint: str, folder: Path, options: EngineClientOptions = FAST, service_options: ServiceOptions | None = None
) -> Iterator[Doors]:
    service = DoorService(EngineClient(endpoint, options=options), folder, "tiny", options=service_options)
    server = HttpServer(build_app(service))
    with httpx.Client(base_url=server.url, timeout=20) as http:
        quick = GrpcOptions(port=0, health_poll_s=0.02)
        more = {"client_options": options, "service_options": service_options, "grpc_options": quick}
        with door(endpoint, folder, **more) as front:
            yield Doors(http, service, front)
    server.close()


@pytest.fixture(scope="module")
def table() -> dict[str, tuple[str, ...]]:
    """Rows by state, in the order of the document; each test adds its own, and at the end it is the document's."""
    return {}


@pytest.fixture(scope="module")
def engine(tiny_path_checkpoint):
    with local_engine(tiny_path_checkpoint, max_running=2, max_queued=8) as engine:
        yield engine


READY, UNREADY = ("200", "200", "SERVING", "SERVING"), ("200", "503", "SERVING", "NOT_SERVING")
LOST = ("503", "503", "NOT_SERVING", "NOT_SERVING")


def test_warming_up(table, tiny_path_checkpoint):
    with socket_folder() as folder, doors(f"ipc://{folder}/e", tiny_path_checkpoint, PATIENT) as found:
        found.reaches(*UNREADY)
        table["warming up: the engine has not answered yet"] = (*found.says(), *found.asked())


def test_serving_over_the_loss_of_the_engine_to_its_return(table, engine, tiny_path_checkpoint):
    with socket_folder() as folder, doors(f"ipc://{folder}/e", tiny_path_checkpoint) as found:
        with engine_thread(engine, f"ipc://{folder}/e"):
            found.reaches(*READY)
            table["serving"] = (*found.says(), *found.asked())
        found.reaches(*LOST)
        table["the engine is lost, or starts again"] = (*found.says(), *found.asked())
        assert "silent" in found.http.get("/health").json()["status"]
        with engine_thread(engine, f"ipc://{folder}/e"):
            found.reaches(*READY)
            assert found.asked() == ("200", "OK")


def test_a_long_step_and_a_full_queue_are_no_reason_to_go_elsewhere(table, engine, tiny_path_checkpoint, monkeypatch):
    release, step = threading.Event(), engine.step
    one = ServiceOptions(max_requests=1)
    with (
        socket_folder() as folder,
        engine_thread(engine, f"ipc://{folder}/e"),
        doors(f"ipc://{folder}/e", tiny_path_checkpoint, service_options=one) as found,
        RawDoor(f"ipc://{folder}/e") as other,
    ):
        found.reaches(*READY)
        monkeypatch.setattr(engine, "step", lambda: (release.wait(30), step())[1], raising=False)
        other.send(SubmitRequest("a", (5,), SamplingParams(1)))
        try:
            wait_for(lambda: engine.info()["num_queued"], what="the request that is to take long")
            time.sleep(1.0)  # twice as long as silence may last
            table["a step takes long"] = (*found.says(), *found.asked())
            holders = [
                threading.Thread(
                    target=lambda: found.http.post("/v1/completions", json={"prompt": "O", "max_tokens": 1})
                ),
                threading.Thread(target=lambda: found.front.client.complete("O", 1)),
            ]
            services = found.service, found.front.service
            wait_for(lambda: not any(s.num_requests for s in services), what="the end of those that waited")
            for holder in holders:
                holder.start()
            wait_for(lambda: all(s.num_requests for s in services), what="as many requests as may be")
            table["the queue is full"] = (*found.says(), *found.asked())
        finally:
            release.set()
        for holder in holders:
            holder.join(20)
        monkeypatch.undo()
        found.reaches(*READY)


def test_hosts_that_are_lost(table, tiny_path_checkpoint, monkeypatch):
    """With one of two the other serves on; with both gone requests wait for them, and new ones are refused."""
    with (
        engine_of(tiny_path_checkpoint, hosts_here(tiny_path_checkpoint, 2)) as engine,
        socket_folder() as folder,
        engine_thread(engine, f"ipc://{folder}/e"),
        doors(f"ipc://{folder}/e", tiny_path_checkpoint) as found,
    ):
        found.reaches(*READY)

        def lose(host: int) -> None:
            def gone() -> None:
                raise HostLostError(host, "it is silent")

            monkeypatch.setattr(engine.exchange.clients[host], "poll", gone)
            monkeypatch.setattr(engine.exchange.clients[host], "returned", lambda: False)

        lose(0)
        wait_for(lambda: engine.info()["hosts"][0]["lost"], what="the loss of a host")
        table["one host of several is lost"] = (*found.says(), *found.asked())
        lose(1)
        found.reaches(*UNREADY)
        table["every host is lost"] = (*found.says(), *found.asked())
        assert "is lost: it is silent; so is host" in found.http.get("/ready").json()["status"]
        monkeypatch.undo()
        found.reaches(*READY)


def test_draining(table, engine, tiny_path_checkpoint):
    with (
        socket_folder() as folder,
        engine_thread(engine, f"ipc://{folder}/e"),
        doors(f"ipc://{folder}/e", tiny_path_checkpoint) as found,
    ):
        found.reaches(*READY)
        step = engine.step
        engine.step = lambda: (time.sleep(0.1), step())[1]
        with found.front.client.generate([5], 100, ignore_eos=True) as running:
            next(running)
            stopping = threading.Thread(target=found.front.stop, args=(30.0,))
            stopping.start()
            found.service._draining = True  # `drain` says so first, and then waits
            found.reaches("200", "503", "NOT_SERVING", "NOT_SERVING")
            table["draining"] = (*found.says(), *found.asked())
            assert found.http.get("/ready").json()["status"] == "the server is draining"
        stopping.join(30)
        del engine.step


def test_no_door_is_ready_before_a_token_was_generated(engine, tiny_path_checkpoint, monkeypatch):
    """An engine that answers pings and computes nothing."""
    monkeypatch.setattr("pregate.router.doors.service._PROOF_S", 0.3)
    stuck, step = threading.Event(), engine.step
    monkeypatch.setattr(engine, "step", lambda: (stuck.wait(20), step())[1], raising=False)
    with (
        socket_folder() as folder,
        engine_thread(engine, f"ipc://{folder}/e"),
        doors(f"ipc://{folder}/e", tiny_path_checkpoint) as found,
    ):
        wait_for(lambda: found.http.get("/v1/models").status_code == 200, what="the engine")
        try:
            found.reaches("200", "503", "SERVING", "SERVING")
            assert "no token could be generated" in found.http.get("/ready").json()["status"]
        finally:
            stuck.set()
        wait_for(lambda: found.http.get("/ready").status_code == 200, what="a token")


def test_the_document_says_what_was_seen(table):
    """The rows of the tests above; where only some of them ran, those."""
    if not table:
        pytest.skip("the rows are those of this file's other tests")
    begin, end = "## What health says\n\n", "\n\n"
    text = DOCS.read_text()
    before, _, rest = text.partition(begin)
    written, _, after = rest.partition(end)
    order = sorted(table, key=ORDER.index)
    lines = ["| " + " | ".join(row) + " |" for row in (HEAD, ["---"] * len(HEAD), *((s, *table[s]) for s in order))]
    print("\n" + "\n".join(lines))
    if "WRITE_DOCS" in os.environ:
        DOCS.write_text(before + begin + "\n".join(lines) + end + after)
    else:
        assert set(lines) <= set(written.splitlines())


ORDER = [
    "warming up: the engine has not answered yet",
    "serving",
    "a step takes long",
    "the queue is full",
    "one host of several is lost",
    "every host is lost",
    "draining",
    "the engine is lost, or starts again",
]
