"""What makes an engine's clients of its hosts. It runs in the engine's process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import HostAddress
from pregate.workers.link.transport import CurveKeys


def connect(address: HostAddress, keys: CurveKeys) -> Any:
    """A channel to one host."""
    import zmq

    from pregate.workers.client.channel import ChannelClient
    from pregate.workers.client.channel_options import ChannelOptions

    return ChannelClient(address, ChannelOptions(keys=keys), zmq.Context.instance())


def connect_all(make_clients: Sequence[Callable[[], Any]]) -> list[Any]:
    """One channel per host, in order."""
    return [make_client() for make_client in make_clients]


def in_process(model: str, parent: str | None, units: Sequence[tuple[int, int]], options: HostOptions) -> list[Any]:
    """`--hosts 0`: one host, in the engine's process, that holds every unit."""
    from pregate.model.checkpoint import CheckpointReader
    from pregate.model.read_check import Hashes
    from pregate.workers.client.host_client import InProcessClient
    from pregate.workers.host.host import ExpertHost

    reader = CheckpointReader(model, parent, hashes=Hashes.WHILE_READ)
    return [InProcessClient(ExpertHost(reader, units, options, beside_engine=True))]
