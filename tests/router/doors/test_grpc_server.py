"""The gRPC door itself: port, TLS, tokens, health, reflection. No engine is needed: its absence is a state too."""

import platform
import shutil
import time
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tokenizers import Tokenizer

import pregate
from pregate.base.errors import CheckpointError, UnavailableError, UserError
from pregate.client.client import Client
from pregate.client.connection import _CHANNEL_OPTIONS
from pregate.client.proto import pregate_pb2 as pb
from pregate.client.proto import pregate_pb2_grpc as pb_grpc
from pregate.router.doors.access import AccessOptions
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.router.doors.grpc_server import GrpcServer
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient
from pregate.router.link.engine_health import EngineClientOptions
from tests.router.doors.certificates import certify
from tests.router.running import door, served, slow_steps, wait_for

HASTY = EngineClientOptions(keep_alive_s=0.1, silence_s=0.5, reply_timeout_s=1.0)


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("alpha\nbeta\n")
    return path


@pytest.fixture(scope="session")
def tls(authority):
    return certify(authority, "server")


def test_without_an_engine_calls_end_unavailable_and_health_says_so(endpoint, tiny_dense):
    with door(endpoint, tiny_dense, client_options=HASTY) as front:
        assert not front.client.health()
        assert front.client.health(""), "it lives, and looks for its engine"
        wait_for(lambda: not front.client.health(""), what="a door of no use")
        info = front.client.server_info()
        assert "the engine has" in info.unavailable
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
                    with pytest.raises(
                        UserError, match=r"asks for a bearer token: .*`--token-file`.* is (missing|not one)"
                    ):
                        call()
        with grpc.insecure_channel(front.target) as channel, pytest.raises(grpc.RpcError) as error:
            ProtoReflectionDescriptorDatabase(channel).get_services()
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        for token in ("alpha", "beta"):
            with Client(front.target, token=token, retry_s=0) as client, pytest.raises(UnavailableError):
                client.model_info()


def test_tls_carries_calls_and_refuses_plain_ones(endpoint, tiny_dense, authority, tls, token_file):
    cert, key = tls
    access = AccessOptions(host="0.0.0.0", tls_cert=cert, tls_key=key, token_file=token_file)
    options = GrpcOptions(port=0, access=access)
    with door(endpoint, tiny_dense, grpc_options=options, client_options=HASTY) as front:
        port = front.target.rpartition(":")[2]
        with Client(f"localhost:{port}", token="alpha", ca=authority / "ca.pem", retry_s=0) as client:
            assert client.health() is False
            with pytest.raises(UnavailableError, match="the engine"):
                client.model_info()
        with Client(f"localhost:{port}", ca=authority / "ca.pem") as client, pytest.raises(UserError, match="token"):
            client.model_info()
        for host in ("127.0.0.1", "localhost"):  # of localhost gRPC may name the address that refuses
            with Client(f"{host}:{port}", timeout_s=30) as plain:
                for call in (plain.health, plain.model_info):
                    with pytest.raises(UserError, match=f"^ca: missing; {host}:{port} speaks TLS"):
                        call()


def test_a_bad_certificate_is_refused(endpoint, tiny_dense, tls, tmp_path):
    bad = tmp_path / "bad.pem"
    bad.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    service = DoorService(EngineClient(endpoint), tiny_dense, "tiny")
    server = GrpcServer(service, GrpcOptions(port=0, access=AccessOptions(tls_cert=bad, tls_key=tls[1])))
    with door(endpoint, tiny_dense) as front, pytest.raises(UserError, match="certificate is not usable"):
        front.loop.call(server.start())


def test_a_client_without_our_proto_asks_by_reflection(tiny_path_checkpoint):
    with served(tiny_path_checkpoint) as (_, front), grpc.insecure_channel(front.target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"pregate.v1.Pregate", "grpc.health.v1.Health"} <= set(database.get_services())
        service = DescriptorPool(database).FindServiceByName("pregate.v1.Pregate")
        assert {method.name for method in service.methods} >= {"Generate", "Abort", "GetModelInfo", "Route"}
        generate = service.FindMethodByName("Generate")
        asked: Any = GetMessageClass(generate.input_type)
        answered: Any = GetMessageClass(generate.output_type)
        request = asked(text="O wind", stream=True, sampling_params={"max_tokens": 8, "ignore_eos": True})
        call = channel.unary_stream(
            f"/{service.full_name}/Generate",
            request_serializer=asked.SerializeToString,
            response_deserializer=answered.FromString,
        )
        *chunks, last = call(request, timeout=60)
        assert "".join(answer.chunk.text for answer in chunks) == last.complete.text
        assert last.complete.text == front.client.complete("O wind", 8, ignore_eos=True).text


def test_with_a_ca_for_clients_only_their_certificates_get_in(endpoint, tiny_dense, authority, tls):
    cert, key = tls
    access = AccessOptions(host="0.0.0.0", tls_cert=cert, tls_key=key, tls_client_ca=authority / "ca.pem")
    own = certify(authority, "client")
    wrong = certify(authority, "stranger", ca="other"), certify(authority, "expired", days=-1)
    with door(endpoint, tiny_dense, grpc_options=GrpcOptions(port=0, access=access), client_options=HASTY) as front:
        target = f"localhost:{front.target.rpartition(':')[2]}"
        with Client(target, ca=authority / "ca.pem", cert=own[0], key=own[1]) as client:
            assert client.server_info().model == "tiny"
        for pair in ((None, None), *wrong):
            with Client(target, ca=authority / "ca.pem", cert=pair[0], key=pair[1], timeout_s=30) as client:
                for call in (client.server_info, client.health):
                    with pytest.raises(UserError, match=r"cert: missing|is not accepted by"):
                        call()
    with pytest.raises(UserError, match=r"tls_client_ca .*: needs tls_cert and tls_key"):
        AccessOptions(tls_client_ca=authority / "ca.pem")


def test_an_expired_certificate_of_the_server_is_not_believed(endpoint, tiny_dense, authority):
    cert, key = certify(authority, "old", days=-1)
    options = GrpcOptions(port=0, access=AccessOptions(tls_cert=cert, tls_key=key))
    with (
        door(endpoint, tiny_dense, grpc_options=options) as front,
        Client(front.target, ca=authority / "ca.pem", timeout_s=30) as client,
        pytest.raises(UserError, match="certificate has expired"),
    ):
        client.server_info()


def test_a_server_without_tls_is_named(endpoint, tiny_dense, authority):
    with (
        door(endpoint, tiny_dense) as front,
        Client(front.target, ca=authority / "ca.pem", timeout_s=30) as client,
        pytest.raises(UserError, match=r"ca .*ca.pem: .* speaks no TLS; leave it out"),
    ):
        client.server_info()


def test_a_call_that_is_quiet_for_many_pings_is_not_cut(tiny_path_checkpoint):
    """Servers' defaults end a connection at the third ping in vain within five minutes; clients send one a second."""
    pings = {"grpc.keepalive_time_ms": 100}
    options = list(({**dict(_CHANNEL_OPTIONS), **pings}).items())
    with served(tiny_path_checkpoint) as (engine, front), grpc.insecure_channel(front.target, options) as channel:
        slow_steps(engine, 6.0)
        sampling = pb.SamplingParams(max_tokens=1, ignore_eos=True)
        request = pb.GenerateRequest(text="O wind", sampling_params=sampling)
        (answer,) = pb_grpc.PregateStub(channel).Generate(request, timeout=60)
        assert answer.complete.finish_reason == "length"


def test_what_a_server_says_of_itself(tiny_path_checkpoint):
    with served(tiny_path_checkpoint, num_hosts=0) as (engine, front):
        info, loads = front.client.server_info(), front.client.loads()
        assert (info.version, info.model, info.unavailable) == (pregate.__version__, "tiny", "")
        assert info.versions["python"] == platform.python_version()
        assert {"torch", "ray", "grpcio"} <= info.versions.keys()
        assert info.options["grpc_port"] == "0"
        assert 0 < info.uptime_s < 600
        assert loads.kv_blocks == loads.kv_blocks_free == engine.info()["kv_blocks"]
        slow_steps(engine, 0.02)
        with front.client.generate("O wind", 200, ignore_eos=True) as call:
            next(call)
            busy = front.client.loads()
            assert (busy.num_running, busy.num_requests) == (1, 1)
            assert busy.kv_blocks_free < busy.kv_blocks
            assert [host.host_id for host in busy.hosts] == [0]


def test_a_chat_is_answered_by_the_models_template(tiny_path_checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_path_checkpoint, folder)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (folder / "chat_template.jinja").write_text(template)
    with served(folder) as (_, front):
        messages = [{"role": "user", "content": "O wind"}]
        answer = front.client.chat(messages, 8, ignore_eos=True)
        text = "".join(chunk.text for chunk in answer)
        written = Tokenizer.from_file(str(folder / "tokenizer.json"))
        prompt = written.encode("user: O wind\nassistant:", add_special_tokens=False).ids
        assert text == answer.completion.text == front.client.complete(prompt, 8, ignore_eos=True).text
        with pytest.raises(UserError, match="messages of length 0"):
            list(front.client.chat([]))
        with pytest.raises(UserError, match="messages 'O wind': must be a list of mappings"):
            front.client.chat("O wind")  # pyright: ignore[reportArgumentType]
