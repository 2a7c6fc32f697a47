"""The gRPC door itself: port, TLS, tokens, health, reflection. No engine is needed: its absence is a state too."""

import shutil
import subprocess
import time

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from pregate.base.errors import CheckpointError, PregateError, UnavailableError, UserError
from pregate.client.client import Client
from pregate.router.doors.access import AccessOptions
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.router.doors.grpc_server import GrpcServer
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient, EngineClientOptions
from tests.router.running import door

HASTY = EngineClientOptions(keep_alive_s=0.1, silence_s=0.5, reply_timeout_s=1.0)


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("alpha\nbeta\n")
    return path


@pytest.fixture(scope="session")
def tls(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem"
    subprocess.run([*command.split(), "-addext", names], cwd=folder, check=True, capture_output=True, timeout=60)
    return folder / "cert.pem", folder / "key.pem"


def test_without_an_engine_calls_end_unavailable_and_health_says_so(endpoint, tiny_dense):
    with door(endpoint, tiny_dense, client_options=HASTY) as front:
        assert not front.client.health()
        assert not front.client.health("pregate.v1.Pregate")
        start_s = time.monotonic()
        for call in (lambda: front.client.complete("x"), front.client.model_info, lambda: front.client.route("x")):
            with pytest.raises(UnavailableError, match="the engine"):
                call()
        assert time.monotonic() - start_s < 15


def test_a_port_in_use_is_named(endpoint, tiny_dense):
    with door(endpoint, tiny_dense) as front:
        port = int(front.target.rpartition(":")[2])
        service = DoorService(EngineClient(endpoint), tiny_dense, "tiny")
        second = GrpcServer(service, GrpcOptions(port=port))
        with pytest.raises(UserError, match=f"grpc_port {port} on 127.0.0.1: cannot be listened on"):
            front.loop.call(second.start())


def test_a_public_interface_needs_tls_and_tokens(endpoint, tiny_dense):
    service = DoorService(EngineClient(endpoint), tiny_dense, "tiny")
    with pytest.raises(UserError, match=r"host 0\.0\.0\.0: needs tls_cert"):
        GrpcServer(service, GrpcOptions(access=AccessOptions(host="0.0.0.0")))


def test_a_model_folder_needs_its_tokenizer(endpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        DoorService(EngineClient(endpoint), tmp_path, "tiny")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: "):
        DoorService(EngineClient(endpoint), tmp_path, "tiny")


def test_tokens_are_asked_of_every_call_but_health(endpoint, tiny_dense, token_file):
    options = GrpcOptions(port=0, access=AccessOptions(token_file=token_file))
    with door(endpoint, tiny_dense, grpc_options=options, client_options=HASTY) as front:
        assert front.client.health() is False
        for token in (None, "gamma"):
            with Client(front.target, token=token) as client:
                for call in (lambda: client.complete("x"), client.model_info, lambda: client.route("x")):
                    with pytest.raises(UserError, match=r"token .*authorization: Bearer"):
                        call()
        with grpc.insecure_channel(front.target) as channel, pytest.raises(grpc.RpcError) as error:
            ProtoReflectionDescriptorDatabase(channel).get_services()
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        for token in ("alpha", "beta"):
            with Client(front.target, token=token) as client, pytest.raises(UnavailableError):
                client.model_info()


def test_tls_carries_calls_and_refuses_plain_ones(endpoint, tiny_dense, tls, token_file):
    cert, key = tls
    access = AccessOptions(host="0.0.0.0", tls_cert=cert, tls_key=key, token_file=token_file)
    options = GrpcOptions(port=0, access=access)
    with door(endpoint, tiny_dense, grpc_options=options, client_options=HASTY) as front:
        port = front.target.rpartition(":")[2]
        with Client(f"localhost:{port}", token="alpha", ca=cert) as client:
            assert client.health() is False
            with pytest.raises(UnavailableError, match="the engine"):
                client.model_info()
        with Client(f"localhost:{port}", ca=cert) as client, pytest.raises(UserError, match="token"):
            client.model_info()
        with Client(f"127.0.0.1:{port}", timeout_s=5) as plain, pytest.raises(PregateError) as error:
            plain.health()
        assert "if the server speaks TLS, give ca" in str(error.value)


def test_a_bad_certificate_is_refused(endpoint, tiny_dense, tls, tmp_path):
    bad = tmp_path / "bad.pem"
    bad.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    service = DoorService(EngineClient(endpoint), tiny_dense, "tiny")
    server = GrpcServer(service, GrpcOptions(port=0, access=AccessOptions(tls_cert=bad, tls_key=tls[1])))
    with door(endpoint, tiny_dense) as front, pytest.raises(UserError, match="certificate is not usable"):
        front.loop.call(server.start())


def test_reflection_lists_the_services(endpoint, tiny_dense):
    with door(endpoint, tiny_dense) as front, grpc.insecure_channel(front.target) as channel:
        names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"pregate.v1.Pregate", "grpc.health.v1.Health"} <= names
