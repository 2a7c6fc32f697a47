"""One request's trace across door, path service, engine and expert host; and nothing of it where nobody asks."""

import socket
import subprocess
import sys
import time

import httpx
import pytest

from pregate.base import telemetry
from pregate.base.errors import UnavailableError, UserError
from pregate.base.telemetry import NO_SPAN, Telemetry, check_endpoint, span
from pregate.cluster.config import ServeConfig
from pregate.router.doors.connect import connect_service
from pregate.router.doors.openai_app import build_app
from pregate.router.link.link import EngineLink, LinkOptions
from pregate.router.link.messages import FailedEvent, SamplingParams, SubmitRequest
from pregate.router.paths.actor import PathActor
from pregate.router.paths.options import PathOptions
from tests.otlp import collector
from tests.router.doors.test_openai_app import HttpServer
from tests.router.running import RawDoor, engine_thread, local_engine, socket_folder, wait_for

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture(scope="module")
def url(tiny_path_checkpoint):
    with local_engine(tiny_path_checkpoint, num_hosts=2) as engine, socket_folder() as folder:
        paths = PathActor(PathOptions(model=str(tiny_path_checkpoint)), f"ipc://{folder}/paths")
        paths.start()
        with engine_thread(engine, f"ipc://{folder}/engine"):
            service = connect_service([f"ipc://{folder}/engine"], f"ipc://{folder}/paths", tiny_path_checkpoint, "tiny")
            server = HttpServer(build_app(service))
            yield server.url
            server.close()
        paths.stop()


@pytest.fixture
def traces(own_log, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    monkeypatch.setattr(telemetry, "_provider", None)
    with collector() as found:
        Telemetry(otlp_endpoint=found.url).begin("all")
        yield found
        telemetry._provider.shutdown()


def complete(url, **headers):
    body = {"prompt": [1, 40, 41], "max_tokens": 3, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)


def test_a_request_is_one_trace_under_its_caller(url, traces):
    assert complete(url, traceparent=f"00-{TRACE}-{PARENT}-01", **{"x-request-id": "mine"}).status_code == 200
    wait_for(lambda: len(traces.of_trace(TRACE)) >= 6, what="the spans")
    spans = {one.name: one for one in traces.of_trace(TRACE)}
    assert set(spans) == {"request", "paths", "engine", "queue", "prefill", "decode"}
    assert spans["request"].parent == PARENT
    ids = {name: one.span.span_id.hex() for name, one in spans.items()}
    assert spans["paths"].parent == spans["engine"].parent == ids["request"]
    assert {spans[name].parent for name in ("queue", "prefill", "decode")} == {ids["engine"]}
    about = {one.key: one.value for one in spans["request"].span.attributes}
    assert about["request_id"].string_value == "mine" and about["tokens"].int_value == 3
    times = [(spans[n].span.start_time_unix_nano, spans[n].span.end_time_unix_nano) for n in ("request", "engine")]
    assert times[0][0] <= times[1][0] <= times[1][1] <= times[0][1]
    assert spans["prefill"].span.end_time_unix_nano == spans["decode"].span.start_time_unix_nano


def test_who_sends_no_trace_begins_one_and_who_is_not_sampled_none(url, traces):
    assert complete(url).status_code == 200
    assert complete(url, traceparent=f"00-{TRACE}-{PARENT}-00").status_code == 200
    bad = httpx.post(f"{url}/v1/completions", json={"prompt": [1], "top_p": 7}, timeout=60)
    assert bad.status_code == 400
    wait_for(lambda: len(traces.spans) >= 7, what="the spans")
    roots = [one for one in traces.spans if one.name == "request"]
    assert [root.parent for root in roots] == ["", ""]
    assert len({one.span.trace_id for one in traces.spans}) == 2
    assert [root.span.status.message for root in roots] == ["", "INVALID_ARGUMENT: top_p"]


def test_spans_end_of_who_finds_the_queue_full_and_who_waits_for_an_engine_that_stands_still(traces):
    """The link answers, and nobody takes what it holds; then it stops."""
    caller = f"00-{TRACE}-{PARENT}-01"
    with socket_folder() as folder:
        link = EngineLink(f"ipc://{folder}/engine", dict, LinkOptions(max_pending_requests=1), None)
        link.start()
        try:
            with RawDoor(f"ipc://{folder}/engine") as door:
                for name in ("waits", "refused"):
                    door.send(SubmitRequest(name, (1,), SamplingParams(2), traceparent=caller))
                assert door.receive(FailedEvent).request_id == "refused"
                wait_for(lambda: traces.of_trace(TRACE), 60, "the span of who is refused")
                (refused,) = traces.of_trace(TRACE)
        finally:
            link.stop(UnavailableError("the engine is stopping"))
        wait_for(lambda: len(traces.of_trace(TRACE)) > 1, 60, "the span of who waits")
    waits = next(one for one in traces.of_trace(TRACE) if one is not refused)
    assert (refused.name, waits.name, refused.parent, waits.parent) == ("engine", "engine", PARENT, PARENT)
    assert refused.span.status.message.startswith("RESOURCE_EXHAUSTED: ")
    assert waits.span.status.message == "UNAVAILABLE: the engine is stopping"


def test_without_an_endpoint_nothing_is_loaded():
    assert span("x", "", root=True) is NO_SPAN
    code = "import sys, pregate.router.doors.door, pregate.router.link.server; print('opentelemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("endpoint", ["localhost:4318", "grpc://x:4317", "http://", "http://a b"])
def test_what_is_no_collector_is_refused(endpoint):
    with pytest.raises(UserError, match=r"otlp_endpoint .*: allowed: http:// or https://"):
        check_endpoint(endpoint)
    with pytest.raises(UserError, match="otlp_endpoint"):
        ServeConfig.from_dict({"model": "/m", "otlp_endpoint": endpoint})


def test_a_collector_that_does_not_answer_holds_no_process_at_its_end(own_log, monkeypatch):
    monkeypatch.setattr(telemetry, "_provider", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "6")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        Telemetry(otlp_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}").begin("all")
        span("one", root=True).end()
        began_s = time.monotonic()
        telemetry.flush()
        assert time.monotonic() - began_s < 5
    telemetry._provider.shutdown()
