"""What reads a small checkpoint, and hosts behind real servers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pregate.model.checkpoint import CheckpointReader
from pregate.workers.client.channel import ChannelClient
from pregate.workers.client.channel_options import ChannelOptions
from pregate.workers.host.contract import Host
from pregate.workers.host.server import HostServer, ServerOptions
from pregate.workers.link.protocol import HostAddress

#: Of `unit_checkpoint`.
WIDTH = 512


@pytest.fixture
def reader(unit_checkpoint: Path) -> CheckpointReader:
    return CheckpointReader(unit_checkpoint)


class Served:
    """A host behind its real server in this process, and clients of it."""

    def __init__(self, host: Host, folder: Path, **options: Any) -> None:
        self.host = host
        self.server = HostServer(host, ServerOptions(options.pop("endpoint", f"ipc://{folder}/h/0.sock"), **options))
        self.server.start()
        self._clients: list[ChannelClient] = []

    @property
    def address(self) -> HostAddress:
        return HostAddress(
            self.host.options.host_id,
            self.server.endpoint,
            self.host.incarnation,
            os.getpid(),
            "127.0.0.1",
            self.server.public_key,
        )

    def client(self, hello: bool = True, width: int = WIDTH, dtype: torch.dtype = torch.float32, **options: Any):
        """A client of engine `e`, past its handshake unless `hello` is False."""
        client = ChannelClient(self.address, ChannelOptions(**options))
        self._clients.append(client)
        if hello:
            client.hello(engine="e", fingerprint=self.host.fingerprint, dtype=dtype, width=width, max_rows=64)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.server.stop()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Serve a host on an ipc socket (or what `endpoint=` says) until the test ends."""
    served: list[Served] = []

    def start(host: Host, **options: Any) -> Served:
        served.append(Served(host, tmp_path, **options))
        return served[-1]

    yield start
    for one in served:
        one.close()
