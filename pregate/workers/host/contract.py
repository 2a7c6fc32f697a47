"""`Host`: what a server, or an engine in the same process, needs of a host; `host.py` is the real one.

Shape letters: N rows of a group, P (row, expert) pairs, D hidden width, L layers, R routed experts.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from pregate.workers.client.local import LocalUnits
from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import CacheCounters, Expected, GroupIndex, GroupKey, Hello, HelloAck, HostPlan


class Host(Protocol):
    """What a server or an in-process client needs of a host."""

    options: HostOptions
    incarnation: str
    fingerprint: str

    def warm_up(self) -> None:
        """Compile the kernels that groups will be run with, before the first comes; logged with its seconds."""
        ...

    def accept(self, hello: Hello, *, heartbeat_s: float, data_endpoint: str) -> HelloAck:
        """Take an engine's terms; UserError with the reason when they do not fit."""
        ...

    def put_plan(self, engine: str, plan: HostPlan) -> None:
        """Keep the plan of one step of an engine; ProtocolError when it contradicts itself."""
        ...

    def expect(self, engine: str, expected: Expected) -> None:
        """Take in what an engine expects to ask for later; ProtocolError where it is of another model."""
        ...

    def forget(self, engine: str) -> None:
        """Drop an engine's plans. May be called from another thread than the one that computes."""
        ...

    def close(self) -> None:
        """End the threads of the host's own. It computes on, fetching nothing ahead."""
        ...

    def compute(self, key: GroupKey, rows_ND: torch.Tensor, index: GroupIndex | None) -> torch.Tensor:
        """Return [P, D], one row per pair in pair order. Raises NeedPlanError, ProtocolError, UserError."""
        ...

    def local_units(self, device: torch.device, dtype: torch.dtype) -> LocalUnits | str:
        """Return what this host holds to an engine in its process that computes on `device` in `dtype` and runs whole
        layers, or why that must ask for groups."""
        ...

    def cache_counters(self) -> CacheCounters:
        """Return what experts that come and go have cost so far. May be called from any thread."""
        ...

    @property
    def steady(self) -> bool:
        """Whether all units that this host is home to are held, and stay."""
        ...

    def held_units(self) -> np.ndarray | None:
        """Return which units are held or on their way, bool [L, R]; None where it cannot say. From any thread."""
        ...

    def status(self) -> dict[str, Any]:
        """Return plain counters and facts, for people and metrics."""
        ...
