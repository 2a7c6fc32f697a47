"""A client's first word to a host, whatever its connection met before."""

import contextlib
import os
import socket

import torch

from benchmarks.echo import EchoHost
from pregate.workers.client.channel import ChannelClient
from pregate.workers.client.channel_options import ChannelOptions
from pregate.workers.host.options import HostOptions
from pregate.workers.host.server import HostServer, ServerOptions
from pregate.workers.link.protocol import HostAddress


def test_hello_is_said_on_a_new_connection():
    """Built while something else listened at the host's address: ZeroMQ gives that socket up for good."""
    host = EchoHost(HostOptions())
    with socket.create_server(("127.0.0.1", 0)) as other:
        endpoint = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        address = HostAddress(0, endpoint, host.incarnation, os.getpid(), "127.0.0.1")
        client = ChannelClient(address, ChannelOptions(hello_timeout_s=30.0))
        other.settimeout(60)
        connection, _ = other.accept()
        with connection, contextlib.suppress(ConnectionError):
            connection.settimeout(60)
            connection.recv(64)
            connection.sendall(bytes(64))
            while connection.recv(64):
                pass
    server = HostServer(host, ServerOptions(endpoint))
    server.start()
    try:
        client.hello(engine="e", fingerprint=host.fingerprint, dtype=torch.float32, width=512, max_rows=64)
        assert client.stats.renewals == 0, "it did not wait until the connection had taken too long"
    finally:
        client.close()
        server.stop()
