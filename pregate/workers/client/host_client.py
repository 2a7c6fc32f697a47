"""What an engine holds of a host: in its own process or over a channel, behind one interface.

Shape letters: N rows of a group, P (row, expert) pairs, D hidden width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from pregate.base.errors import PregateError
from pregate.base.log import get_logger
from pregate.workers.client.channel import ChannelClient
from pregate.workers.client.channel_options import ChannelOptions, ChannelStats
from pregate.workers.client.local import LocalUnits
from pregate.workers.client.sent_plans import SentPlans
from pregate.workers.host.plan_shelf import NeedPlanError
from pregate.workers.link.protocol import CacheCounters, Expected, GroupIndex, GroupKey, Hello, HelloAck, HostPlan
from pregate.workers.link.rows import dtype_name
from pregate.workers.link.transport import CurveKeys

if TYPE_CHECKING:
    from pregate.workers.host.contract import Host

__all__ = [
    "ChannelClient",
    "ChannelOptions",
    "ChannelStats",
    "CurveKeys",
    "HostClient",
    "InProcessClient",
    "LocalUnits",
]

_log = get_logger(__name__)


class HostClient(Protocol):
    """One engine's end of one host."""

    host_id: int
    node: str  # its machine's address; "" of a host in this process
    stats: ChannelStats

    @property
    def cache(self) -> CacheCounters:
        """What the host's experts did, as it last said."""
        ...

    @property
    def held_LR(self) -> np.ndarray | None:  # noqa: N802
        """As `units_LR`; None where the host holds all that it is home to, and goes on to."""
        ...

    @property
    def units_LR(self) -> np.ndarray | None:  # noqa: N802
        """Which units the host holds or is loading, bool [L, R], as it last said; None before it has said it."""
        ...

    def hello(self, *, engine: str, fingerprint: str, dtype: torch.dtype, width: int, max_rows: int) -> HelloAck:
        """Agree on terms. Raises UserError with the host's reason when it refuses, HostLostError without an answer."""
        ...

    def fence(self, hello: Hello | None = None) -> None:
        """Give up a lost host: groups on their way are forgotten, whatever it still says is discarded until it has been
        greeted anew (`returned`), under the terms of `hello` where it was never greeted before."""
        ...

    def returned(self) -> bool:
        """Greet a host that is fenced, without waiting; True once it has answered, or where it was not fenced."""
        ...

    def warm_up(self) -> None:
        """Let a host in this process compile its kernels; one in a process of its own did when it started."""
        ...

    def send_plan(self, plan: HostPlan) -> None:
        """Send the plan of one step; it precedes the groups of that step that carry no index."""
        ...

    def expect(self, expected: Expected) -> None:
        """Say what is expected to be asked for later. It may get lost: the next one says it anew."""
        ...

    def send_group(self, key: GroupKey, rows_ND: torch.Tensor, index: GroupIndex | None = None) -> None:
        """Send one group's rows; `index` None leaves the rest to the step's plan."""
        ...

    def receive(self, key: GroupKey, timeout_s: float) -> torch.Tensor:
        """Wait for one group's answer [P, D]. Every sent group is received once.

        Raises HostLostError when the host falls silent or does not get on for `timeout_s`, and what it failed with.
        """
        ...

    def abandon(self, key: GroupKey | None = None) -> None:
        """Forget a group that was sent and not received, or all of them: its answer is discarded."""
        ...

    def local_units(self, device: torch.device, dtype: torch.dtype) -> LocalUnits | str:
        """Return what the host holds, where it is in this process and can run whole layers there; else why not."""
        ...

    def poll(self) -> None:
        """Take in what has arrived, without waiting; HostLostError while the host has been silent for too long."""
        ...

    def close(self) -> None:
        """Leave. Answers still on their way are lost."""
        ...


class InProcessClient:
    """A host in the engine's own process: a channel that is a function call."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._engine = ""
        self._plans = SentPlans()
        self._groups: dict[GroupKey, tuple[torch.Tensor, GroupIndex | None]] = {}
        self.host_id, self.node = host.options.host_id, ""
        self.stats = ChannelStats()

    @property
    def cache(self) -> CacheCounters:
        return self._host.cache_counters()

    @property
    def held_LR(self) -> np.ndarray | None:  # noqa: N802
        return None if self._host.steady else self._host.held_units()

    @property
    def units_LR(self) -> np.ndarray | None:  # noqa: N802
        return self._host.held_units()

    def hello(self, *, engine: str, fingerprint: str, dtype: torch.dtype, width: int, max_rows: int) -> HelloAck:
        self._engine = engine
        hello = Hello(engine, fingerprint, dtype_name(dtype), width, max_rows)
        return self._host.accept(hello, heartbeat_s=0.0, data_endpoint="")

    def fence(self, hello: Hello | None = None) -> None:
        self._groups = {}
        if hello is not None:
            self._engine = hello.engine

    def returned(self) -> bool:
        return True

    def warm_up(self) -> None:
        self._host.warm_up()

    def send_plan(self, plan: HostPlan) -> None:
        self._plans.put(plan)
        self._host.put_plan(self._engine, plan)
        self.stats.plans += 1

    def expect(self, expected: Expected) -> None:
        self._host.expect(self._engine, expected)

    def send_group(self, key: GroupKey, rows_ND: torch.Tensor, index: GroupIndex | None = None) -> None:
        self._groups[key] = (rows_ND, index)
        self.stats.groups += 1
        self.stats.indexed_groups += index is not None

    def receive(self, key: GroupKey, timeout_s: float) -> torch.Tensor:
        rows_ND, index = self._groups.pop(key)
        try:
            try:
                return self._host.compute(key, rows_ND, index)
            except NeedPlanError:
                self._host.put_plan(self._engine, self._plans.get(key.step))
                self.stats.resent_groups += 1
                return self._host.compute(key.next_attempt(), rows_ND, index)
        except PregateError:
            raise
        except Exception as error:
            # As over a channel: what goes wrong in one group (no memory, a defect) is that group's failure.
            _log.exception("host %d failed at %s", self.host_id, key)
            raise PregateError(f"expert host {self.host_id}: {type(error).__name__}: {error}") from error

    def abandon(self, key: GroupKey | None = None) -> None:
        self._groups = {k: group for k, group in self._groups.items() if key not in (None, k)}

    def local_units(self, device: torch.device, dtype: torch.dtype) -> LocalUnits | str:
        return self._host.local_units(device, dtype)

    def poll(self) -> None:
        pass

    def close(self) -> None:
        self._host.forget(self._engine)
        self._host.close()
