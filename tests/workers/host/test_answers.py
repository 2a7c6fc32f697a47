"""What a client makes of the answers of a host that follows a script."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
import zmq

from pregate.base.errors import HostLostError
from pregate.workers.client.channel import ChannelClient
from pregate.workers.client.channel_options import ChannelOptions
from pregate.workers.link.protocol import (
    GroupKey,
    GroupMessage,
    HelloAck,
    HostAddress,
    Rows,
    RowsMessage,
)
from pregate.workers.link.wire import decode, encode
from tests.workers.host.raw_peer import HELLO, KEY, RawPeer, wait_until


class ScriptedHost:
    """The host's end of the channel, driven by the test step by step."""

    def __init__(self, folder: Path) -> None:
        self.control = RawPeer(f"ipc://{folder}/scripted.sock", zmq.ROUTER)
        self.data = RawPeer(f"ipc://{folder}/scripted.sock.d", zmq.ROUTER)
        self.folder = folder
        self.peer = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.control.__exit__()
        self.data.__exit__()

    def client(self) -> ChannelClient:
        """A client past its handshake, which has sent KEY."""
        address = HostAddress(0, f"ipc://{self.folder}/scripted.sock", "h1", os.getpid(), "127.0.0.1")
        client = ChannelClient(address, ChannelOptions(hello_timeout_s=5.0))
        with ThreadPoolExecutor(1) as pool:
            greeting = pool.submit(self._greet)
            client.hello(engine="e", fingerprint="echo", dtype=torch.float32, width=4, max_rows=64)
            greeting.result(10)
        return client

    def greet(self, client: ChannelClient) -> None:
        """Answer the client, which greets on new sockets and then sends again."""
        self._greet()
        sent = client.stats.resent_groups
        wait_until(lambda: client.poll() is None and client.stats.resent_groups > sent)

    def _greet(self) -> None:
        peer, *frames = self.control.socket.recv_multipart()
        assert decode(frames) == HELLO
        ack = HelloAck(0, "h1", 1, 64, 0, 0.5, f"ipc://{self.folder}/scripted.sock.d")
        self.control.socket.send_multipart([peer, *encode(ack)])

    def take_group(self) -> GroupMessage:
        """Receive what the client sent; from now on `say` reaches it."""
        self.peer, *frames = self.data.socket.recv_multipart()
        message = decode(frames)
        assert isinstance(message, GroupMessage)
        return message

    def say(self, message) -> None:
        self.data.socket.send_multipart([self.peer, *encode(message)])


def rows_message(value: float, key: GroupKey = KEY, incarnation: str = "h1") -> RowsMessage:
    return RowsMessage(key, incarnation, Rows("float32", (1, 4), torch.full((1, 4), value).numpy().tobytes()))


def test_answers_of_other_attempts_engines_and_incarnations_are_discarded(tmp_path):
    with ScriptedHost(tmp_path) as host:
        client = host.client()
        current = KEY._replace(attempt=3)
        client.send_group(current, torch.zeros(1, 4))
        assert host.take_group().key == current
        host.say(rows_message(1.0, KEY._replace(attempt=2)))
        host.say(rows_message(2.0, current._replace(engine="older")))
        host.say(rows_message(3.0, current._replace(step=4)))
        host.say(rows_message(4.0, current, incarnation="h0"))
        host.say(rows_message(5.0, current))
        host.say(rows_message(6.0, current))
        assert client.receive(current, 5.0).tolist() == [[5.0] * 4]
        assert client.stats.discarded_answers == 4
        wait_until(lambda: client.poll() is None and client.stats.discarded_answers == 5)
        client.close()


@pytest.mark.parametrize("num_damaged", [1, 3, 4])
def test_a_damaged_answer_is_asked_for_again_and_a_host_that_gives_none_other_is_lost(tmp_path, num_damaged):
    with ScriptedHost(tmp_path) as host, closing(host.client()) as client:
        client.send_group(KEY, torch.zeros(1, 4))
        for attempt in range(num_damaged):
            assert host.take_group().key.attempt == attempt
            frames = [bytes(f) for f in encode(rows_message(1.0, KEY._replace(attempt=attempt)))]
            host.data.socket.send_multipart([host.peer, frames[0], b"\1" + frames[1][1:]])
            if attempt < 3:
                wait_until(lambda sent=attempt: client.poll() is None and client.stats.renewals > sent)
                host.greet(client)
        if num_damaged == 4:
            with pytest.raises(HostLostError, match="4 messages could not be read: message fails its checksum"):
                client.receive(KEY, 5.0)
            return
        host.say(rows_message(2.0, host.take_group().key))
        assert client.receive(KEY, 5.0).tolist() == [[2.0] * 4]
