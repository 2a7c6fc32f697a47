"""`connect`: greet the hosts and choose the exchange, once, at start."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import numpy as np
import torch

from pregate.base.errors import HostLostError
from pregate.base.log import get_logger
from pregate.model.checkpoint import CheckpointReader
from pregate.router.engine.channel_exchange import ChannelExchange
from pregate.router.engine.exchange import Exchange
from pregate.router.engine.local_exchange import LocalExchange
from pregate.router.engine.members import Members
from pregate.router.engine.options import EngineOptions
from pregate.router.engine.shared_experts import SharedExperts
from pregate.workers.client.host_client import HostClient
from pregate.workers.link.protocol import Hello

_log = get_logger(__name__)


def connect(
    options: EngineOptions, clients: Sequence[HostClient], copies_LRC: np.ndarray, reader: CheckpointReader
) -> Exchange:
    """Agree with every host on terms and return the exchange: local where the one host is in this process and can run
    whole layers, else the channel. `copies_LRC` int16 [L, R, C]: hosts that hold each unit, its home first.

    Raises UserError when a host refuses, HostLostError when none answers.
    """
    engine, device, dtype = uuid.uuid4().hex, torch.device(options.device), getattr(torch, options.dtype)
    hello = Hello(engine, reader.fingerprint, options.dtype, reader.hidden_size, options.step_tokens)
    acks, absent = [], {}
    for host, client in enumerate(clients):
        try:
            acks.append(client.hello(**vars(hello) | {"dtype": dtype}))
        except HostLostError as error:  # it may be starting again; others serve its units
            absent[host] = error
    shared = SharedExperts(reader.config, device, dtype)
    local = clients[0].local_units(device, dtype) if len(clients) == 1 else f"{len(clients)} hosts"
    if isinstance(local, str):
        _log.info("experts run in groups, host by host: %s", local)
        timeout_s, check = options.group_timeout_s, options.check_steps
        members = Members(clients, copies_LRC, hello)
        for host, error in absent.items():
            members.lose(host, error)
        return ChannelExchange(engine, members, shared, timeout_s, check, any(ack.looks_ahead for ack in acks))
    _log.info("experts run in whole layers: the one host is in this process")
    return LocalExchange(engine, clients[0], local, shared)
