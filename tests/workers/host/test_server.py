import os
import stat
import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest
import torch
import zmq

from benchmarks.echo import EchoHost
from pregate.base.errors import HostLostError, UserError
from pregate.workers.client.channel import ChannelClient
from pregate.workers.host.options import HostOptions
from pregate.workers.host.server import HostServer, ServerOptions
from pregate.workers.link.protocol import (
    PROTOCOL_VERSION,
    Failure,
    Heartbeat,
    HelloAck,
    HostAddress,
    NeedHello,
    RowsMessage,
)
from pregate.workers.link.wire import encode
from tests.chaos.proxy import NONE, Fault, Proxy
from tests.workers.host.raw_peer import GROUP, HELLO, KEY, WIDTH, RawPeer, wait_until


@pytest.mark.parametrize("side", ["control", "data"])
def test_damaged_and_foreign_messages_are_answered_and_survived(serve, side):
    served = serve(EchoHost(HostOptions()))
    data = side == "data"
    endpoint = served.server.data_endpoint if data else served.server.endpoint
    with RawPeer(endpoint, routing_id=b"draw" if data else b"craw") as peer:
        damaged = [bytes(f) for f in encode(GROUP)]
        damaged[1] = b"\1" + damaged[1][1:]
        for frames, complaint in (
            ([b"GET / HTTP/1.1"], "no header"),
            ([b""], "no header"),
            ([b"x" * 100], "not of pregate"),
            (damaged, "checksum"),
            ([damaged[0][:4] + bytes([PROTOCOL_VERSION + 1, 0, 0, 0]) + damaged[0][8:]], f"speaks {PROTOCOL_VERSION}"),
        ):
            answer = peer.ask(frames)
            assert isinstance(answer, Failure)
            assert complaint in answer.text
    client = served.client()
    client.send_group(KEY, torch.ones(1, WIDTH))
    assert torch.equal(client.receive(KEY, 5.0), torch.ones(1, WIDTH))


def test_strangers_and_misplaced_messages_are_refused(serve):
    served = serve(EchoHost(HostOptions()))
    with (
        RawPeer(served.server.endpoint) as control,
        RawPeer(served.server.data_endpoint, routing_id=b"draw") as data,
    ):
        answer = data.ask(encode(GROUP))
        assert isinstance(answer, NeedHello)
        assert answer.key == KEY
        ack = control.ask(encode(HELLO))
        assert isinstance(ack, HelloAck)
        assert ack.data_endpoint == served.server.data_endpoint
        assert isinstance(data.ask(encode(GROUP)), RowsMessage)
        for peer, message in ((control, GROUP), (control, Heartbeat("x", 1, "", 0.0)), (data, HELLO)):
            answer = peer.ask(encode(message))
            assert isinstance(answer, Failure)
            assert f"socket takes no {type(message).__name__}" in answer.text


def test_engines_that_leave_or_vanish_are_forgotten(serve):
    class Remembering(EchoHost):
        forgotten: tuple[str, ...] = ()

        def forget(self, engine):
            self.forgotten += (engine,)

    host = Remembering(HostOptions())
    served = serve(host, heartbeat_s=0.05)
    first, second = served.client(), served.client()
    assert served.server.num_clients == 2
    first.close()
    wait_until(lambda: served.server.num_clients == 1)
    assert host.forgotten == (), "the engine still has a connection"
    second._connection.close(0)  # no Bye
    wait_until(lambda: served.server.num_clients == 0)
    wait_until(lambda: host.forgotten == ("e",))
    served._clients.clear()


def test_drain_refuses_new_engines_and_waits_for_the_rest(serve):
    class Slow(EchoHost):
        def compute(self, key, rows_ND, index):
            time.sleep(0.4)
            return rows_ND

    served = serve(Slow(HostOptions()))
    client = served.client()
    wait_until(lambda: served.server._compute.quiet)
    client.send_group(KEY, torch.ones(1, 4))
    wait_until(lambda: not served.server._compute.quiet)
    assert not served.server.drain(timeout_s=0.05)
    assert served.server.drain(timeout_s=5.0)
    assert torch.equal(client.receive(KEY, 5.0), torch.ones(1, 4))
    with pytest.raises(UserError, match="draining"):
        served.client()


def test_the_socket_folder_is_private_and_the_file_goes(tmp_path):
    path = tmp_path / "run" / "h.sock"
    server = HostServer(EchoHost(HostOptions()), ServerOptions(f"ipc://{path}"))
    server.start()
    assert {p.name for p in path.parent.iterdir()} == {"h.sock", "h.sock.d"}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    server.stop()
    assert list(path.parent.iterdir()) == []


def test_endpoints_that_must_not_be(tmp_path):
    tmp_path.chmod(0o755)
    server = HostServer(EchoHost(HostOptions()), ServerOptions(f"ipc://{tmp_path}/h.sock"))
    with pytest.raises(UserError, match="mode 755; it must be yours, with mode 700"):
        server.start()
    assert not (tmp_path / "h.sock").exists()
    for endpoint, complaint in (
        (f"ipc://{tmp_path}/{'x' * 105}", "at most 105 bytes"),
        ("tcp://0.0.0.0:*", "needs allowed client keys"),
        ("tcp://*:5555", "needs allowed client keys"),
        ("udp://127.0.0.1:1", "allowed: ipc://PATH or tcp://ADDRESS:PORT"),
    ):
        with pytest.raises(UserError, match=complaint):
            ServerOptions(endpoint)


def test_a_port_in_use_is_a_clear_error():
    with RawPeer("tcp://127.0.0.1:*", zmq.ROUTER) as holder:
        taken = holder.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        server = HostServer(EchoHost(HostOptions()), ServerOptions(taken))
        with pytest.raises(UserError, match="cannot listen there"):
            server.start()


class HoldingHost(EchoHost):
    """Says that it holds so many units."""

    num_units = 0

    def accept(self, hello, **terms):
        return replace(super().accept(hello, **terms), num_units=self.num_units)


@pytest.fixture
def replaced(tmp_path):
    """A client whose host, of 3 units, is another incarnation than the one greeted, of as many as are asked for."""
    endpoint, running = f"ipc://{tmp_path}/r/h.sock", []

    def serve_host(num_units):
        host = HoldingHost(HostOptions())
        host.num_units = num_units
        server = HostServer(host, ServerOptions(endpoint))
        server.start()
        running.append(server.stop)
        return host, server

    def replace_by(num_units):
        host, server = serve_host(3)
        client = ChannelClient(HostAddress(0, endpoint, host.incarnation, os.getpid(), "127.0.0.1"))
        running.append(client.close)
        client.hello(engine="e", fingerprint="echo", dtype=torch.float32, width=4, max_rows=64)
        server.stop()
        serve_host(num_units)
        return client

    yield replace_by
    for stop in reversed(running):
        stop()


def test_another_incarnation_with_the_same_units_is_taken(replaced):
    client = replaced(3)
    client.send_group(KEY, torch.ones(1, 4))
    assert torch.equal(client.receive(KEY, 10.0), torch.ones(1, 4))
    assert client.stats.resent_groups == 1


def test_another_incarnation_with_fewer_units_is_not(replaced):
    client = replaced(2)
    client.send_group(KEY, torch.zeros(1, 4))
    with pytest.raises(HostLostError, match="another incarnation which holds 2 units, not 3"):
        client.receive(KEY, 10.0)


def cut(served, client) -> None:
    """Break the connection of the client's control socket until the host has forgotten it."""
    control = client._connection.control
    control.disconnect(served.server.endpoint)
    # What has arrived must be read before ZeroMQ lets go of the connection.
    wait_until(lambda: not client._drain(control) and served.server.num_clients == 0)


def test_a_client_that_was_cut_off_greets_again_and_its_group_is_sent_again(serve):
    served = serve(EchoHost(HostOptions()), heartbeat_s=0.05)
    client = served.client()
    cut(served, client)
    client.send_group(KEY, torch.ones(2, WIDTH))
    client._connection.control.connect(served.server.endpoint)
    assert torch.equal(client.receive(KEY, 10.0), torch.ones(2, WIDTH))
    assert served.server.num_clients == 1
    assert client.stats.resent_groups >= 1


def test_a_client_that_was_cut_off_while_idle_greets_again(serve):
    """Heartbeats do not come to who was forgotten: it is the client that speaks first, before it complains."""
    served = serve(EchoHost(HostOptions()), heartbeat_s=0.05)
    client = served.client(host_timeout_s=1.0)
    cut(served, client)
    client._connection.control.connect(served.server.endpoint)
    wait_until(lambda: client.poll() is None and served.server.num_clients == 1)


def test_a_host_that_seemed_to_talk_nonsense_is_taken_back(serve):
    """After an answer to its greeting that makes no sense ZeroMQ gives a socket up for good."""
    served = serve(EchoHost(HostOptions()))
    client = served.client(host_timeout_s=0.4, hello_timeout_s=2.0)
    with closing(Proxy(served.server.endpoint)) as proxy:
        proxy.fault = Fault(damage=lambda data, _: bytes(len(data)), share=1.0)
        client.fence()
        end_s = time.monotonic() + 1.0
        while time.monotonic() < end_s:
            assert not client.returned()
            time.sleep(0.02)
        proxy.fault = NONE
        wait_until(client.returned, 20.0)
        client.send_group(KEY, torch.ones(1, WIDTH))
        assert torch.equal(client.receive(KEY, 10.0), torch.ones(1, WIDTH))
        client.close()
    served._clients.clear()


def test_engines_are_served_in_turn(serve):
    """What one has asked for long before does not come before all that another asks for."""
    order, both_sent = [], threading.Event()

    class Held(EchoHost):
        """Computes on after three groups when both have sent."""

        def compute(self, key, rows_ND, index):
            if len(order) > 2:
                assert both_sent.wait(10)
            time.sleep(0.005)
            order.append(key.engine)
            return rows_ND

    served = serve(Held(HostOptions()))
    greedy, modest = served.client(), served.client()
    for number in range(60):
        greedy.send_group(KEY._replace(engine="greedy", group=number), torch.ones(1, WIDTH))
    wait_until(lambda: len(order) > 2)
    for number in range(5):
        modest.send_group(KEY._replace(engine="modest", group=number), torch.ones(1, WIDTH))
    both_sent.set()
    modest.receive(KEY._replace(engine="modest", group=4), 10.0)
    assert len(order) < 40, order
