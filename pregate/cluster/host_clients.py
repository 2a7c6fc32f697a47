"""How an engine comes to its host clients. These functions run in the engine's process."""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from pregate.model.checkpoint import CheckpointReader
from pregate.workers.channel import ChannelClient, ChannelOptions
from pregate.workers.client import HostClient, InProcessClient
from pregate.workers.host import ExpertHost
from pregate.workers.host_options import HostOptions
from pregate.workers.protocol import HostAddress
from pregate.workers.transport import CurveKeys


def connect(addresses: Sequence[HostAddress], keys: CurveKeys) -> list[HostClient]:
    """One channel per host, in the order of the addresses."""
    context = zmq.Context()
    return [ChannelClient(address, ChannelOptions(keys=keys), context) for address in addresses]


def in_process(model: str, units: Sequence[tuple[int, int]], options: HostOptions) -> list[HostClient]:
    """`--hosts 0`: one host, here, that holds every unit."""
    return [InProcessClient(ExpertHost(CheckpointReader(model), units, options))]
