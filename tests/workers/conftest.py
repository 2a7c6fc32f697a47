"""A small real checkpoint with units large enough to see which of them were read, and hosts behind real servers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from pregate.model.checkpoint import CheckpointReader
from pregate.model.config import LayerCut, RoutedConfig
from pregate.model.modeling import RoutedForCausalLM
from pregate.workers.client.channel import ChannelClient
from pregate.workers.client.channel_options import ChannelOptions
from pregate.workers.host.contract import Host
from pregate.workers.host.server import HostServer, ServerOptions
from pregate.workers.link.protocol import HostAddress

#: Two routed layers around a dense one; a unit is 3 x 256 x 512 fp32 values, 1.5 MiB.
CUTS = (LayerCut(6, 2, 2, 256), LayerCut(0, 8, 0, 256), LayerCut(5, 3, 2, 256))
WIDTH = 512
UNIT_BYTES = 3 * 256 * WIDTH * 4


@pytest.fixture(scope="session")
def unit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: hidden 512, layers S2R6, dense, S3R5, experts of 256 neurons, fp32."""
    path = tmp_path_factory.mktemp("workers") / "checkpoint"
    parent = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = RoutedForCausalLM(RoutedConfig(parent, [asdict(cut) for cut in CUTS]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mlp in model.routed_mlps:
            if mlp.experts is not None:
                mlp.experts.gate_up_proj.normal_(0, 0.1, generator=generator)
                mlp.experts.down_proj.normal_(0, 0.1, generator=generator)
    model.float().save_pretrained(path)
    return path


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
