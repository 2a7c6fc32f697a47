"""Nothing gets in without what a door asks for: certificates and tokens, none, wrong, expired and taken back."""

from __future__ import annotations

import itertools
import os
import ssl
from contextlib import suppress

import grpc
import httpx
import pytest

from pregate import Client
from pregate.base.errors import UserError
from pregate.client.proto import pregate_pb2 as pb
from pregate.router.doors.access import AccessOptions, TokenFile
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.router.doors.metrics_app import MetricsServer
from pregate.router.doors.openai_app import OPEN_PATHS, build_app
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient
from tests.router.doors.certificates import certify
from tests.router.doors.test_openai_app import HttpServer
from tests.router.running import LoopThread, door, engine_thread, slow_steps

METHODS = ("Generate", "Abort", "GetModelInfo", "GetServerInfo", "GetLoads", "Route")


@pytest.fixture(scope="module")
def pairs(authority):
    """Certificates and keys by what is wrong with them."""
    own, old = certify(authority, "known"), certify(authority, "old", days=-1)
    return {"none": (None, None), "wrong": certify(authority, "another", ca="other"), "expired": old, "right": own}


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("alpha\n")
    return path


@pytest.fixture
def serving(engine, endpoint):
    with engine_thread(engine, endpoint):
        yield endpoint


def replace(path, text):
    """As an operator does it: whole at once."""
    path.with_name("new").write_text(text)
    os.replace(path.with_name("new"), path)


def test_over_grpc_both_certificate_and_token_must_be_right(serving, tiny_path_checkpoint, authority, pairs, tokens):
    cert, key = certify(authority, "server")
    access = AccessOptions("0.0.0.0", cert, key, authority / "ca.pem", tokens)
    ca, found = (authority / "ca.pem").read_bytes(), {}
    with door(serving, tiny_path_checkpoint, grpc_options=GrpcOptions(0, access=access), engine_first=True) as front:
        target = f"localhost:{front.target.rpartition(':')[2]}"
        for name, token in itertools.product(pairs, ("none", "wrong", "alpha")):
            parts = [None if path is None else path.read_bytes() for path in pairs[name]]
            credentials = grpc.ssl_channel_credentials(ca, parts[1], parts[0])
            metadata = () if token == "none" else (("authorization", f"Bearer {token}"),)
            with grpc.secure_channel(target, credentials) as channel:
                for method in METHODS:
                    call = channel.unary_stream(f"/pregate.v1.Pregate/{method}")
                    stream = call(b"", timeout=20, metadata=metadata)
                    with suppress(grpc.RpcError):
                        list(stream)
                    found.setdefault((name, token), set()).add(stream.code().name)
        with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary("/pregate.v1.Pregate/GetServerInfo")(b"", timeout=20)
        own = dict(zip(("cert", "key"), pairs["right"], strict=True))
        with (
            Client(target, "alpha", authority / "other.pem", **own) as client,
            pytest.raises(UserError, match=r"the certificate of .* is not accepted"),
        ):
            client.server_info()
    print(found)
    for (name, token), codes in found.items():
        if name != "right":
            assert codes == {"UNAVAILABLE"}, "no connection"
        elif token != "alpha":
            assert codes == {"UNAUTHENTICATED"}
        else:
            assert codes == {"OK", "INVALID_ARGUMENT"}, "an empty message is answered, or its prompt is missed"


def test_a_token_is_taken_back_and_another_given_while_both_doors_serve(engine, serving, tiny_path_checkpoint, tokens):
    """What streams goes on; whoever asks next is looked at anew. A file that is emptied by mistake locks nobody out."""
    slow_steps(engine, 0.02)
    access = AccessOptions(token_file=tokens)
    app = build_app(DoorService(EngineClient(serving), tiny_path_checkpoint, "tiny"), tokens=TokenFile(tokens))
    server = HttpServer(app)
    body = {"prompt": "O wind", "max_tokens": 1}

    def http(token):
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=20).status_code

    with door(serving, tiny_path_checkpoint, grpc_options=GrpcOptions(0, access=access), engine_first=True) as front:

        def grpc_(token):
            with Client(front.target, token, retry_s=0) as client:
                try:
                    client.complete("O wind", 1)
                except UserError as error:
                    return 401 if "asks for a bearer token" in str(error) else str(error)
                return 200

        with Client(front.target, "alpha") as client, client.generate("O wind", 100, ignore_eos=True) as running:
            next(running)
            assert [(grpc_(t), http(t)) for t in ("alpha", "beta")] == [(200, 200), (401, 401)]
            for text, alpha, beta in [("alpha\nbeta\n", 200, 200), ("beta\n", 401, 200), ("", 401, 200)]:
                replace(tokens, text)
                assert [(grpc_(t), http(t)) for t in ("alpha", "beta")] == [(alpha, alpha), (beta, beta)], text
            assert len(list(running)) > 0 and running.completion.completion_tokens == 100
    server.close()
    del engine.step


def test_over_http_every_path_but_the_open_ones_asks_for_a_token(serving, tiny_path_checkpoint, tokens):
    app = build_app(DoorService(EngineClient(serving), tiny_path_checkpoint, "tiny"), tokens=TokenFile(tokens))
    server = HttpServer(app)
    paths = {getattr(route, "path", "") for route in app.routes} | {
        "/nowhere",
        "//v1/models",
        "/health/",
        "/health/../v1/models",
    }
    with httpx.Client(base_url=server.url, timeout=20) as client:
        for path, header in itertools.product(
            sorted(paths), ({}, {"Authorization": "Bearer wrong"}, {"Authorization": ""})
        ):
            for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT"):
                answer = client.request(method, path, headers=header)
                assert (answer.status_code == 401) == (path not in OPEN_PATHS), (method, path, answer.status_code)
        assert client.get("/v1/models", headers={"Authorization": "Bearer alpha"}).status_code == 200
    server.close()
    assert {"/", "/health", "/ready", "/version"} == OPEN_PATHS


def test_metrics_are_guarded_as_grpc_is(serving, tiny_path_checkpoint, authority, pairs, tokens):
    cert, key = certify(authority, "metrics")
    access = AccessOptions("127.0.0.1", cert, key, authority / "ca.pem", tokens)
    loop = LoopThread()
    metrics = MetricsServer(DoorService(EngineClient(serving), tiny_path_checkpoint, "tiny"), access)
    port = loop.call(metrics.start(0))
    found = {}
    for name, token in itertools.product(pairs, ("none", "wrong", "alpha")):
        context = ssl.create_default_context(cafile=str(authority / "ca.pem"))
        if pairs[name][0] is not None:
            context.load_cert_chain(*map(str, pairs[name]))
        header = {} if token == "none" else {"Authorization": f"Bearer {token}"}
        try:
            with httpx.Client(verify=context, timeout=20) as client:
                found[name, token] = client.get(f"https://localhost:{port}/metrics", headers=header).status_code
        except httpx.TransportError:
            found[name, token] = 0
    loop.call(metrics.stop())
    loop.close()
    right = {("right", "none"): 401, ("right", "wrong"): 401, ("right", "alpha"): 200}
    assert found == {key: right.get(key, 0) for key in found}


def test_the_messages_asked_for_are_the_proto_s():
    assert set(METHODS) == {method.name for method in pb.DESCRIPTOR.services_by_name["Pregate"].methods}
