"""A request's id, the client's or one made, is in the lines of door, path service and engine, and in errors."""

import io
import json
import logging

import grpc
import pytest
from fastapi.testclient import TestClient

from pregate.base import log
from pregate.client.proto import pregate_pb2 as pb
from pregate.router.doors.connect import connect_service
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.router.doors.grpc_server import GrpcServer
from pregate.router.doors.openai_app import build_app
from pregate.router.link.messages import SamplingParams
from pregate.router.paths.actor import PathActor
from pregate.router.paths.options import PathOptions
from tests.router.running import LoopThread, engine_thread, local_engine, socket_folder


@pytest.fixture(scope="module")
def endpoints(tiny_path_checkpoint):
    with local_engine(tiny_path_checkpoint) as engine, socket_folder() as folder:
        paths = PathActor(PathOptions(model=str(tiny_path_checkpoint)), f"ipc://{folder}/paths")
        paths.start()
        with engine_thread(engine, f"ipc://{folder}/engine"):
            yield f"ipc://{folder}/engine", f"ipc://{folder}/paths"
        paths.stop()


@pytest.fixture
def service(endpoints, tiny_path_checkpoint):
    engine, paths = endpoints
    return connect_service([engine], paths, tiny_path_checkpoint, "tiny")


@pytest.fixture
def lines(own_log):
    """What this process has logged as JSON; all parts are in it."""
    log.configure("all", "json")
    text = io.StringIO()
    (handler,) = logging.getLogger("pregate").handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(text)
    return lambda: [json.loads(line) for line in text.getvalue().splitlines()]


def trailing(call):
    """The id that a call's end carries."""
    return next(value for key, value in call.trailing_metadata() if key == "x-request-id")


def said(found, name):
    """(the last part of the logger's name, message) of the lines about one request."""
    return [(line["logger"].rpartition(".")[2], line["message"]) for line in found if line.get("request_id") == name]


WHOLE = [
    ("request_watch", "taken: 2 prompt tokens, 1 texts"),
    ("link", "taken: 2 tokens"),
    ("link", "ended: paths"),
    ("link", "taken: 2 tokens"),
    ("link", "ended: length after 2 tokens"),
    ("request_watch", "text ended: length after 2 tokens"),
]


def test_over_http_the_header_names_it_in_every_part_and_in_errors(service, lines):
    body = {"prompt": [1, 40], "max_tokens": 2, "ignore_eos": True}
    with TestClient(build_app(service), raise_server_exceptions=False) as http:
        answer = http.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"})
        assert answer.json()["id"] == "cmpl-mine-1"
        bad = http.post("/v1/completions", json={**body, "top_p": 7}, headers={"x-request-id": "mine-2"})
        unknown = http.post("/v1/completions", json={**body, "model": "x"}, headers={"x-request-id": "no\tname"})
        missing = http.get("/nowhere", headers={"x-request-id": "mine-3"})
    found = lines()
    assert said(found, "mine-1") == WHOLE
    assert all(line["role"] == "all" and line["time"].endswith("+00:00") for line in found)
    error = bad.json()["error"]
    assert error["request_id"] == "mine-2"
    assert said(found, "mine-2") == [("errors", "INVALID_ARGUMENT: top_p")]
    made = unknown.json()["error"]["request_id"]
    assert len(made) == 32
    assert [message for _, message in said(found, made)] == ["NOT_FOUND: model"]
    assert missing.json()["error"]["request_id"] == "mine-3"


def test_what_was_sent_is_told_to_its_sender_alone(service, lines):
    """An error quotes the value that is wrong, which may be a prompt; no log has it."""
    with TestClient(build_app(service)) as http:
        for body in (
            {"prompt": ["secret", 3]},
            {"prompt": "a", "secret_key": "secret"},
            {"prompt": "a", "stop": {"secret": 1}},
        ):
            assert "secret" in http.post("/v1/completions", json=body).json()["error"]["message"]
    assert [line["message"] for line in lines() if "INVALID" in line["message"]] == [
        f"INVALID_ARGUMENT: {field}" for field in ("prompt", "secret_key", "stop")
    ]
    assert '"secret"' not in str(lines())


def test_an_error_in_a_stream_names_it(service, lines):
    body = {"prompt": [1, 40], "max_tokens": 200, "ignore_eos": True, "stream": True}
    with TestClient(build_app(service, timeout_s=0.05)) as http:
        answer = http.post("/v1/completions", json=body, headers={"x-request-id": "late"})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")] or [
        answer.json()
    ]
    assert events[-1]["error"]["request_id"] == "late"
    assert ("errors", f"DEADLINE_EXCEEDED: {events[-1]['error']['message']}") in said(lines(), "late")


def test_over_grpc_metadata_or_the_message_names_it(service, lines):
    loop = LoopThread()
    server = GrpcServer(service, GrpcOptions(port=0))
    port = loop.call(server.start())
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        generate = channel.unary_stream("/pregate.v1.Pregate/Generate")
        request = pb.GenerateRequest(
            tokenized=pb.TokenizedInput(input_ids=[1, 40]),
            sampling_params=pb.SamplingParams(max_tokens=2, ignore_eos=True),
        )
        list(generate(request.SerializeToString(), metadata=(("x-request-id", "meta-1"),), timeout=60))
        request.request_id = "field-1"
        list(generate(request.SerializeToString(), metadata=(("x-request-id", "meta-2"),), timeout=60))
        request.model, request.request_id = "x", ""
        with pytest.raises(grpc.RpcError) as caught:
            list(generate(request.SerializeToString(), timeout=60))
        call = generate(b"\xff", metadata=(("x-request-id", "no name"),), timeout=60)
        with pytest.raises(grpc.RpcError):
            list(call)
    loop.call(server.stop(1))
    loop.close()
    found = lines()
    assert said(found, "meta-1") == said(found, "field-1") == WHOLE
    assert said(found, "meta-2") == []
    name = trailing(caught.value)
    assert said(found, name) == [("grpc_calls", "NOT_FOUND: model")]
    assert len(trailing(call)) == 32


def test_who_leaves_is_said_in_every_part(service, lines):
    async def leave():
        log.name_request("gone")
        stream = service.generate([1, 40], SamplingParams(max_tokens=200, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        await service.model_info()  # the engine has read the cancel that came before

    loop = LoopThread()
    loop.call(leave())
    loop.call(service.close())
    loop.close()
    last_two = [m for _, m in said(lines(), "gone")][-2:]  # of two threads, so in either order
    assert sorted(last_two) == ["ended: cancelled", "the caller left; 1 texts had not ended"]
