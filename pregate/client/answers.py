"""What a server answers beside text: `Route`, `ModelInfo`, `ServerInfo`, `Loads`, and how they are read."""

from __future__ import annotations

import array
import sys
from dataclasses import dataclass, field
from typing import Any, TypeVar

from google.protobuf.message import Message

from pregate.client.proto import pregate_pb2 as pb
from pregate.client.proto.plain import from_message

_T = TypeVar("_T")


@dataclass(frozen=True)
class Route:
    """The routed experts of every prompt token: `paths[token][layer]` holds their ids, ascending.

    `exact`: the path is the routing; otherwise it is a forecast. `version` names the path router.
    """

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    paths: tuple[tuple[tuple[int, ...], ...], ...]
    exact: bool
    version: str


@dataclass(frozen=True)
class HostStatus:
    """Experts of one host since it started: uses that found theirs in its slot and that did not, bytes read, of these
    ahead, and of these for nothing; seconds waited. It holds `num_units` now and means to fetch `num_pending`. `lost`
    says why it does not serve ("": it does), for `lost_s` already. `node` is its machine's address ("": the engine's
    process has its experts)."""

    host_id: int
    num_units: int
    num_pending: int
    hits: int
    misses: int
    read_bytes: int
    prefetched_bytes: int
    wasted_bytes: int
    stall_s: float
    lost: str = ""
    lost_s: float = 0.0
    node: str = ""


@dataclass(frozen=True)
class EngineStatus:
    """One of several engines: why it takes no requests ("": it does), those it has, and the steps of its process."""

    number: int
    unavailable: str
    num_running: int
    num_queued: int
    num_steps: int


@dataclass(frozen=True)
class PathServiceStatus:
    """The process that computes prompts' paths: why it gives none ("": it does), prompts it has not answered and their
    bytes, the turns of its process, and what it computes now ("": nothing), for `busy_s` already."""

    unavailable: str
    num_queued: int
    queued_bytes: int
    num_turns: int
    busy_with: str
    busy_s: float


@dataclass(frozen=True)
class ModelInfo:
    """What a server serves, and how busy it is.

    `unavailable` says why it refuses requests now, "" when it takes them. `busy_with` is what its engine computes now
    ("": nothing), for `busy_s` already; `num_steps` counts the steps it has begun, of together `num_step_tokens` tokens
    and `num_step_units` units; `batching` is how their tokens are chosen.
    """

    model: str
    max_context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    routing: str
    has_path_router: bool
    num_layers: int
    num_hosts: int
    num_running: int
    num_queued: int
    version: str
    num_steps: int
    busy_with: str
    busy_s: float
    unavailable: str
    num_step_tokens: int = 0
    num_step_units: int = 0
    batching: str = ""
    hosts: tuple[HostStatus, ...] = ()


@dataclass(frozen=True)
class ServerInfo:
    """The process that answers: pregate's version, how long it is up, why requests are refused ("": they are taken),
    the versions of what it runs on, the options it was started with, the folder in which its processes log, and the
    address of the machine that they and the engines are on."""

    version: str
    uptime_s: float
    model: str
    unavailable: str
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    logs: str = ""
    node: str = ""


@dataclass(frozen=True)
class Loads:
    """How busy a server is: requests that run, wait, and of these wait for their paths; blocks of the KV cache; what
    gave up its blocks, and prompts' tokens found in the cache; the door's own requests; hosts' experts; the engines
    where there are several; the path service where there is one."""

    num_running: int
    num_queued: int
    num_waiting_for_paths: int
    queued_bytes: int
    kv_blocks: int
    kv_blocks_free: int
    kv_blocks_shared: int
    kv_bytes: int
    num_preempted: int
    prefix_tokens: int
    num_requests: int
    unavailable: str
    busy_with: str
    busy_s: float
    hosts: tuple[HostStatus, ...] = ()
    engines: tuple[EngineStatus, ...] = ()
    path_service: PathServiceStatus | None = None


def read_route(reply: pb.RouteResponse) -> Route:
    """int16 ids, little-endian, -1 padding, as paths."""
    ids = array.array("h", reply.expert_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    width, depth = reply.num_active or 1, reply.num_layers or 1
    rows = [tuple(e for e in ids[i : i + width] if e >= 0) for i in range(0, len(ids), width)]
    return from_message(Route, reply, paths=tuple(tuple(rows[t : t + depth]) for t in range(0, len(rows), depth)))


def read(kind: type[_T], reply: Message) -> _T:
    """An answer as one of the classes above, what is in it with it."""
    parts = {"hosts": HostStatus, "engines": EngineStatus}
    named = {name: tuple(from_message(part, one) for one in getattr(reply, name, ())) for name, part in parts.items()}
    found: dict[str, Any] = {name: some for name, some in named.items() if some}
    if isinstance(reply, pb.GetLoadsResponse):
        there = reply.HasField("path_service")
        found["path_service"] = from_message(PathServiceStatus, reply.path_service) if there else None
    return from_message(kind, reply, **found)
