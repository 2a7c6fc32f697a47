"""A host without experts, and its actor: what remains is the cost of the channel."""

from __future__ import annotations

import os
import uuid
from typing import Any

import torch

from pregate.workers.client.local import LocalUnits
from pregate.workers.host.actor import ExpertHostActor
from pregate.workers.host.contract import Host
from pregate.workers.host.host import check_hello
from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import CacheCounters, Expected, GroupIndex, GroupKey, Hello, HelloAck, HostPlan


class EchoHost:
    """Returns the rows it is sent, of any width, and has no checkpoint (fingerprint "echo")."""

    def __init__(self, options: HostOptions) -> None:
        self.options = options
        self.incarnation = uuid.uuid4().hex
        self.fingerprint = "echo"
        self._num_groups = 0

    def warm_up(self) -> None:
        pass

    def accept(self, hello: Hello, *, heartbeat_s: float, data_endpoint: str) -> HelloAck:
        check_hello(hello, self.options, fingerprint=self.fingerprint, width=hello.width)
        ours = self.options.host_id, self.incarnation, os.getpid()
        return HelloAck(*ours, hello.max_rows, 0, heartbeat_s, data_endpoint)

    def put_plan(self, engine: str, plan: HostPlan) -> None:
        pass

    def expect(self, engine: str, expected: Expected) -> None:
        pass

    def forget(self, engine: str) -> None:
        pass

    def close(self) -> None:
        pass

    def cache_counters(self) -> CacheCounters:
        return CacheCounters()

    steady = True

    def held_units(self) -> None:
        return None

    def compute(self, key: GroupKey, rows_ND: torch.Tensor, index: GroupIndex | None) -> torch.Tensor:
        self._num_groups += 1
        return rows_ND

    def local_units(self, device: torch.device, dtype: torch.dtype) -> LocalUnits | str:
        return "an echo holds nothing"

    def status(self) -> dict[str, Any]:
        return {"host_id": self.options.host_id, "incarnation": self.incarnation, "num_groups": self._num_groups}


class EchoActor(ExpertHostActor):
    """The actor of an `EchoHost`; its options' checkpoint and units are not looked at."""

    def _make_host(self) -> Host:
        return EchoHost(self._options.host)
