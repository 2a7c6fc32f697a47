"""`connect`: greet the hosts and choose the exchange, once, at start."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import numpy as np
import torch

from pregate.base.log import get_logger
from pregate.model.checkpoint import CheckpointReader
from pregate.router.engine.channel_exchange import ChannelExchange
from pregate.router.engine.exchange import Exchange
from pregate.router.engine.local_exchange import LocalExchange
from pregate.router.engine.options import EngineOptions
from pregate.router.engine.shared_experts import SharedExperts
from pregate.workers.client.host_client import HostClient

_log = get_logger(__name__)


def connect(
    options: EngineOptions, clients: Sequence[HostClient], hosts_of_LR: np.ndarray, reader: CheckpointReader
) -> Exchange:
    """Agree with every host on terms and return the exchange: local where the one host is in this process and can run
    whole layers, else the channel. `hosts_of_LR` int16 [L, R]: each unit's home host.

    Raises UserError when a host refuses, HostLostError when one does not answer.
    """
    engine, device, dtype = uuid.uuid4().hex, torch.device(options.device), getattr(torch, options.dtype)
    terms = [
        client.hello(
            engine=engine,
            fingerprint=reader.fingerprint,
            dtype=dtype,
            width=reader.hidden_size,
            max_rows=options.step_tokens,
        )
        for client in clients
    ]
    shared = SharedExperts(reader.config, device, dtype)
    local = clients[0].local_units(device, dtype) if len(clients) == 1 else f"{len(clients)} hosts"
    if isinstance(local, str):
        _log.info("experts run in groups, host by host: %s", local)
        timeout_s, check = options.group_timeout_s, options.check_steps
        return ChannelExchange(engine, clients, hosts_of_LR, shared, timeout_s, check, terms)
    _log.info("experts run in whole layers: the one host is in this process")
    return LocalExchange(engine, clients[0], local, shared)
