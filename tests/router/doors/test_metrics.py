"""What a running server exports is what its requests did, at a port of its own and in the HTTP application."""

import asyncio
import socket
import urllib.error
import urllib.request
from contextlib import aclosing, contextmanager

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from pregate.base.errors import UserError
from pregate.base.metrics import METRICS
from pregate.router.doors.access import AccessOptions, TokenFile
from pregate.router.doors.metrics_app import MetricsServer
from pregate.router.doors.openai_app import build_app
from pregate.router.doors.service import DoorService, ServiceOptions
from pregate.router.link.client import EngineClient
from pregate.router.link.messages import SamplingParams
from tests.router.running import LoopThread, engine_thread, local_engine, socket_folder


def samples(text):
    """Every series by its name and labels, but for model_name, which must be on all of ours."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("pregate_"):
                assert labels.pop("model_name") == "tiny"
            key = (sample.name, *sorted(labels.items()))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


@contextmanager
def metrics_of(service, access=None):
    """The URL of a metrics server, and the loop it runs on."""
    loop = LoopThread()
    server = MetricsServer(service, access or AccessOptions())
    port = loop.call(_start(server))
    try:
        yield f"http://127.0.0.1:{port}/metrics", loop
    finally:
        loop.call(server.stop())
        loop.call(service.close())
        loop.close()


async def _start(server):
    return await server.start(0)


def scrape(url):
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/plain; version=")
        return samples(answer.read().decode())


async def _text(service, prompt, **sampling):
    return await service.complete_all(prompt, SamplingParams(ignore_eos=True, **sampling))


@pytest.fixture(scope="module")
def endpoint(tiny_path_checkpoint):
    with (
        local_engine(tiny_path_checkpoint) as engine,
        socket_folder() as folder,
        engine_thread(engine, f"ipc://{folder}/engine.sock"),
    ):
        yield f"ipc://{folder}/engine.sock"


@pytest.fixture
def service(endpoint, tiny_path_checkpoint):
    return DoorService(EngineClient(endpoint), tiny_path_checkpoint, "tiny", options=ServiceOptions(max_requests=3))


def test_every_metric_of_the_list_is_exported_and_nothing_else(service):
    with metrics_of(service) as (url, loop):
        loop.call(_text(service, [1, 40, 41], max_tokens=2))
        found = {key[0] for key in scrape(url)}
    with_events = ("request_failures_total", "admission_rejections_total")  # labelled: there once there was one
    expected = {name for m in METRICS if m.stem not in with_events for name in m.series}
    ours = {name for name in found if name.startswith("pregate_") and not name.endswith("_created")}
    assert ours == expected
    assert "process_resident_memory_bytes" in found


def test_numbers_are_those_of_the_requests(service):
    with metrics_of(service) as (url, loop):
        before = scrape(url)
        loop.call(_text(service, [1, 40, 41, 42], max_tokens=6))
        loop.call(_text(service, [1, 40, 41], max_tokens=1, n=2))
        with pytest.raises(UserError):
            loop.call(_text(service, [1, 40], max_tokens=0))
        with pytest.raises(Exception, match="as many as it may"):
            loop.call(_text(service, [1], max_tokens=1, n=4))
        after = scrape(url)

    def grown(name, **labels):
        key = (f"pregate_{name}", *sorted(labels.items()))
        return after[key] - before.get(key, 0)

    assert grown("prompt_tokens_total") == 4 + 3
    assert grown("generation_tokens_total") == 6 + 2
    assert grown("request_success_total", finished_reason="length") == 3
    assert grown("request_failures_total", code="INVALID_ARGUMENT") == 1
    assert grown("admission_rejections_total", reason="queue_full") == 1
    for stem in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert grown(f"{stem}_seconds_count") == 3
    assert grown("inter_token_latency_seconds_count") <= 5  # tokens may come together, even all
    assert grown("request_generation_tokens_sum") == 8
    parts = sum(grown(f"request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode"))
    assert 0 < parts <= grown("e2e_request_latency_seconds_sum")
    assert grown("steps_total") >= 7
    assert grown("step_tokens_total") >= 4 + 5 + 3  # the last token of a text is in no step; prompts may be shared
    assert 0 < grown("step_seconds_total") < grown("e2e_request_latency_seconds_sum")
    assert grown("expert_rows_total", host="0") > 0
    assert after[("pregate_engine_up",)] == after[("pregate_path_exact",)] == after[("pregate_num_expert_hosts",)] == 1
    assert after[("pregate_num_requests_at_door",)] == after[("pregate_num_requests_running",)] == 0


def test_a_caller_who_leaves_is_counted_as_abort(service):
    async def leave():
        async with aclosing(service.generate([1, 40], SamplingParams(max_tokens=100, ignore_eos=True))) as stream:
            await anext(stream)

    with metrics_of(service) as (url, loop):
        loop.call(leave())
        found = scrape(url)
    assert found[("pregate_request_success_total", ("finished_reason", "abort"))] == 1
    assert found[("pregate_num_requests_at_door",)] == 0


def test_http_application_exports_the_same_names(service):
    with TestClient(build_app(service)) as http:
        answer = http.get("/metrics")
    assert answer.status_code == 200
    assert ("pregate_engine_up",) in samples(answer.text)


def test_tokens_of_the_door_are_asked_for(service, tmp_path):
    (tmp_path / "tokens").write_text("secret\n")
    with TestClient(build_app(service, tokens=TokenFile(tmp_path / "tokens"))) as http:
        assert http.get("/metrics").status_code == 401
        assert http.get("/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert http.get("/metrics", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_its_own_port_asks_for_the_token_too(service, tmp_path):
    (tmp_path / "tokens").write_text("secret\n")
    with metrics_of(service, AccessOptions(token_file=tmp_path / "tokens")) as (url, _):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            scrape(url)
        request = urllib.request.Request(url, headers={"Authorization": "Bearer secret"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert b"pregate_engine_up" in answer.read()


def test_a_silent_engine_is_down_and_the_door_answers_soon(tiny_path_checkpoint):
    with socket_folder() as folder:
        service = DoorService(EngineClient(f"ipc://{folder}/nobody"), tiny_path_checkpoint, "tiny")
        with metrics_of(service) as (url, _):
            found = scrape(url)
    assert found[("pregate_engine_up",)] == 0
    assert ("pregate_prompt_tokens_total",) in found
    assert ("pregate_steps_total",) not in found


def test_a_port_in_use_is_refused_by_name(service):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = MetricsServer(service, AccessOptions())
        with pytest.raises(UserError, match="cannot be listened on"):
            asyncio.run(server.start(taken.getsockname()[1]))
