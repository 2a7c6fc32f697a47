"""Every message between engine and host: its fields, the protocol's version and its size limits.

The annotations are the schema that `wire.py` reads and writes. Nothing here depends on torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np

from pregate.workers.link.expected import SURE, Expected
from pregate.workers.link.host_plans import GroupIndex, GroupKey, HostPlan

__all__ = [
    "DATA_LOSS",
    "DTYPE_BYTES",
    "KINDS",
    "MAX_HEADER_BYTES",
    "MAX_MESSAGE_BYTES",
    "PROTOCOL_VERSION",
    "SURE",
    "Buffer",
    "Bye",
    "CacheCounters",
    "Expected",
    "ExpectedMessage",
    "Failure",
    "GroupIndex",
    "GroupKey",
    "GroupMessage",
    "Heartbeat",
    "Hello",
    "HelloAck",
    "HostAddress",
    "HostPlan",
    "Message",
    "NeedHello",
    "NeedPlan",
    "PlanMessage",
    "Refused",
    "Rows",
    "RowsMessage",
]

PROTOCOL_VERSION = 8
#: Bounds of what either side accepts; a `Hello` narrows rows and width further.
MAX_HEADER_BYTES = 64 << 10
MAX_MESSAGE_BYTES = 1 << 30
#: Code of a `Failure` without a key that answers a message which could not be read.
DATA_LOSS = "DATA_LOSS"
#: What rows may travel as.
DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})

Buffer: TypeAlias = "bytes | memoryview"


@dataclass(frozen=True)
class HostAddress:
    """Where a host listens. `server_public_key` (Z85) is None on ipc and on a plain loopback socket."""

    host_id: int
    endpoint: str
    incarnation: str
    pid: int
    node_ip: str
    server_public_key: str | None = None


class Rows(NamedTuple):
    """A block of rows as raw bytes: `shape` (rows, width), `dtype` one of `DTYPE_BYTES`."""

    dtype: str
    shape: tuple[int, int]
    data: Buffer


@dataclass(frozen=True)
class Hello:
    """An engine introduces itself and says what it will send. The host answers HelloAck or Refused."""

    engine: str
    fingerprint: str
    dtype: str
    width: int
    max_rows: int


@dataclass(frozen=True)
class HelloAck:
    """The host takes the engine's terms: plans and groups go to `data_endpoint`, heartbeats come every `heartbeat_s`
    on the socket that said hello. `looks_ahead` 1: it wants to be told what to expect."""

    host_id: int
    incarnation: str
    pid: int
    max_rows: int
    num_units: int
    heartbeat_s: float
    data_endpoint: str
    looks_ahead: int = 0


@dataclass(frozen=True)
class Refused:
    """The host does not take the engine's terms; `reason` is a sentence for a person."""

    incarnation: str
    reason: str


@dataclass(frozen=True)
class Bye:
    """The engine leaves: no more heartbeats, its plans may go."""

    engine: str


@dataclass(frozen=True, eq=False)
class PlanMessage:
    """The plan of one step. No answer."""

    engine: str
    plan: HostPlan


@dataclass(frozen=True, eq=False)
class ExpectedMessage:
    """What the engine expects to ask for after the steps it has planned; the last one counts. No answer."""

    engine: str
    expected: Expected


@dataclass(frozen=True, eq=False)
class GroupMessage:
    """Rows of one group. `index` None: the plan of `key.step` says what to do with them."""

    key: GroupKey
    rows: Rows
    index: GroupIndex | None


@dataclass(frozen=True, eq=False)
class RowsMessage:
    """The answer to a group: one row per pair."""

    key: GroupKey
    incarnation: str
    rows: Rows


@dataclass(frozen=True)
class NeedPlan:
    """The host has no plan for this group's step: send it, and the group again."""

    key: GroupKey
    incarnation: str


@dataclass(frozen=True)
class NeedHello:
    """The host does not know who sent this (it was cut off and forgotten): say hello, and send the group again.

    `key` is None where it was a plan.
    """

    key: GroupKey | None
    incarnation: str


@dataclass(frozen=True)
class Failure:
    """The host could not do it. `code` is a gRPC status name, `key` None when no single group is meant."""

    key: GroupKey | None
    incarnation: str
    code: str
    text: str


@dataclass
class CacheCounters:
    """What a host's experts did since its start. `read_bytes` went into slots, from files or host memory, in the
    checkpoint's dtype; `held_bytes` is as in memory.

    A use of a unit is a hit where it was in its slot when it was wanted, else a miss; compute waited `stall_s` for
    those. `wasted_bytes` of the `prefetched_bytes` left again unused. `num_pending`: units to fetch, now.
    """

    num_units: int = 0
    num_pending: int = 0
    units_read: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    read_bytes: int = 0
    held_bytes: int = 0
    prefetched_bytes: int = 0
    wasted_bytes: int = 0
    stall_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Heartbeat:
    """From the host's I/O thread: `progress` counts what the compute thread has finished; `busy_with` names what it
    is at (empty: nothing) and `busy_since_s` for how many seconds already.

    `held_LR` bool [L, R]: the units that it holds or is loading, None where it cannot say; `steady` 1 where it holds
    all that it is home to, and goes on to.
    """

    incarnation: str
    progress: int
    busy_with: str
    busy_since_s: float
    cache: CacheCounters = field(default_factory=CacheCounters)
    held_LR: np.ndarray | None = None
    steady: int = 1

    def describe(self) -> str:
        """For a message about a host of which nothing more is heard."""
        doing = f"busy with {self.busy_with} for {self.busy_since_s:.1f} s" if self.busy_with else "idle"
        return f"last heartbeat: {doing}, {self.progress} messages done"


Message: TypeAlias = (
    Hello
    | HelloAck
    | Refused
    | Bye
    | PlanMessage
    | ExpectedMessage
    | GroupMessage
    | RowsMessage
    | NeedPlan
    | NeedHello
    | Failure
    | Heartbeat
)


#: Name of each message on the wire.
KINDS: Mapping[type, str] = MappingProxyType(
    {
        Hello: "hello",
        HelloAck: "hello_ack",
        Refused: "refused",
        Bye: "bye",
        PlanMessage: "plan",
        ExpectedMessage: "expected",
        GroupMessage: "group",
        RowsMessage: "rows",
        NeedPlan: "need_plan",
        NeedHello: "need_hello",
        Failure: "failure",
        Heartbeat: "heartbeat",
    }
)
