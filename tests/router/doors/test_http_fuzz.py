"""Whatever the OpenAPI document allows, and much that it does not, is answered, and never as a bug of ours."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from pregate.router.doors.openai_app import build_app
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient
from tests.router.doors.test_openai_app import HttpServer
from tests.router.running import engine_thread, local_engine, socket_folder, wait_for

#: What a request may end in; 499 nobody reads, and every other 5xx is ours to mend.
ANSWERS = {200, 400, 401, 404, 405, 413, 422, 429, 503, 504}
OPERATIONS = [
    "GET /health", "GET /ready", "GET /version", "GET /v1/models", "GET /v1/models/{model}", "GET /experts",
    "GET /paths", "POST /tokenize", "POST /detokenize", "POST /v1/route", "POST /v1/completions",
    "POST /v1/chat/completions",
]  # fmt: skip


@pytest.fixture(scope="module")
def http(tiny_path_checkpoint):
    with (
        local_engine(tiny_path_checkpoint) as engine,
        socket_folder() as folder,
        engine_thread(engine, f"ipc://{folder}/e"),
    ):
        app = build_app(DoorService(EngineClient(f"ipc://{folder}/e"), tiny_path_checkpoint, "tiny"), timeout_s=5)
        server = HttpServer(app)
        with httpx.Client(base_url=server.url, timeout=30) as client:
            wait_for(lambda: client.get("/ready").status_code == 200, what="the first token")
            yield client, app.openapi()
        server.close()


def test_every_route_is_tried(http):
    _, document = http
    found = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, GenerationMode.POSITIVE) for name in OPERATIONS]
    + [(name, GenerationMode.NEGATIVE) for name in OPERATIONS if name.startswith("POST")],
)
def test_no_request_ends_in_a_bug(http, name, mode):
    client, document = http
    method, path = name.split()
    operation = schemathesis.openapi.from_dict(document)[path][method]

    @settings(
        max_examples=10,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def attempt(case):
        sent = case.as_transport_kwargs(base_url=str(client.base_url))
        if isinstance(sent.get("json"), dict) and "/completions" in path:
            sent["json"] = sent["json"] | ({"max_tokens": 2} if mode == GenerationMode.POSITIVE else {})
        sent = {k: v for k, v in sent.items() if k in ("method", "url", "headers", "json", "data", "params") and v}
        sent["content"] = sent.pop("data", None)
        answer = client.request(**sent)
        assert answer.status_code in ANSWERS, (sent, answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code", "request_id"}
        assert "internal error" not in answer.text

    attempt()
    assert client.get("/ready").status_code == 200
