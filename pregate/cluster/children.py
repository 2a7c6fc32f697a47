"""What a supervisor owns, as Ray sees it: a placement group, host actors, an engine, front doors, a socket folder.

Everything is created by the supervisor's process and not detached, so Ray takes it down when the supervisor dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pregate.base.errors import UnavailableError
from pregate.base.log import get_logger
from pregate.cluster import host_clients, strict
from pregate.cluster.config import ServeConfig
from pregate.cluster.local_ray import NAMESPACE, RUN_DIR_VARIABLE
from pregate.cluster.placement import Placement, check, place
from pregate.model.checkpoint import CheckpointReader
from pregate.router.actor import EngineActor
from pregate.router.door import DoorActor
from pregate.router.grpc_server import GrpcOptions
from pregate.workers.actor import ActorOptions, ExpertHostActor
from pregate.workers.client import HostClient
from pregate.workers.protocol import HostAddress
from pregate.workers.transport import CurveKeys

#: Logical CPUs an actor of ours asks for: they only admit it. What it may use is its own options' matter.
ACTOR_CPUS = 0.1
#: Pins a bundle to a node through the resource Ray gives every node under its address.
NODE_SHARE = 0.001
STATUS_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0

logger = get_logger(__name__)
T = TypeVar("T")


@dataclass
class _Door:
    owner: str
    actor: Any
    port: int


@dataclass
class _Parts:
    """What exists at the moment; `stop` takes down exactly this."""

    group: PlacementGroup | None = None
    folder: Path | None = None
    hosts: list[Any] = field(default_factory=list)
    engine: Any = None
    doors: list[_Door] = field(default_factory=list)


class RayChildren:
    """The real `supervisor.Children`. Front doors and the engine run on the supervisor's node, hosts anywhere."""

    def __init__(self, config: ServeConfig) -> None:
        self.stage = "starting"
        self._config = config
        self._parts = _Parts()
        self._deadline_s = asyncio.get_running_loop().time() + config.start_timeout_s
        self._node_ip = ray.util.get_node_ip_address()

    async def start(self) -> dict[str, Any]:
        """Place and start hosts, then the engine. Raises what a part failed with, or UnavailableError in time."""
        config, parts = self._config, self._parts
        parts.folder = _make_folder()
        reader = CheckpointReader(config.model)
        num_routed, one_index = [cut.num_routed for cut in reader.config.cuts], reader.config.has_one_index
        placement = place(num_routed, max(1, config.hosts), config.placement, one_index=one_index)
        check(placement, num_routed, one_index)
        self.stage = f"reserving room for {config.hosts} hosts and the engine"
        parts.group = self._reserve()
        await self._in_time(parts.group.ready(), _no_room(config))
        keys = CurveKeys.new()
        self.stage = f"loading {config.hosts} hosts"
        parts.engine = self._make_engine()  # its process comes up while the hosts load
        for host, (bundle, node) in enumerate(_host_bundles_by_node(parts.group)):
            parts.hosts.append(self._make_host(host, bundle, node, placement, keys))
        addresses: list[HostAddress] = await self._in_time(
            asyncio.gather(*(host.start.remote() for host in parts.hosts)), "the hosts did not load"
        )
        self.stage = "loading the engine"
        make_clients = self._clients_maker(placement, addresses, keys)
        started = await self._in_time(
            parts.engine.start.remote(placement.hosts_of, make_clients), "the engine did not load"
        )
        self.stage = "ready"
        hosts = [{"host_id": a.host_id, "endpoint": a.endpoint, "pid": a.pid, "node_ip": a.node_ip} for a in addresses]
        return {**started, "node_ip": self._node_ip, "model_name": config.model_name, "hosts": hosts}

    # ---- making parts ----

    def _reserve(self) -> PlacementGroup:
        config = self._config
        router: dict[str, float] = {"CPU": ACTOR_CPUS, f"node:{self._node_ip}": NODE_SHARE}
        if config.router_gpus:
            router["GPU"] = config.router_gpus
        host: dict[str, float] = {"CPU": ACTOR_CPUS}
        if config.gpus_per_host:
            host["GPU"] = config.gpus_per_host
        bundles = [router, *(dict(host) for _ in range(config.hosts))]
        return placement_group(bundles, strategy="PACK", name=f"pregate:{config.name}")

    def _options(self, role: str, bundle: int, num_gpus: float) -> dict[str, Any]:
        assert self._parts.group is not None
        return {
            "name": f"{self._config.name}/{role}",
            "namespace": NAMESPACE,
            "num_cpus": ACTOR_CPUS,
            "num_gpus": num_gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._parts.group, bundle),
        }

    def _make_host(self, host: int, bundle: int, node: str, placement: Placement, keys: CurveKeys) -> Any:
        """A host beside the engine speaks over a Unix socket; one elsewhere over TCP, encrypted with the keys."""
        config, folder = self._config, self._parts.folder
        beside = node == ray.get_runtime_context().get_node_id()
        options = ActorOptions(
            host=config.host_options(host),
            checkpoint=config.model,
            units=tuple(placement.units_of(host)),
            transport="ipc" if beside else "tcp",
            ipc_folder=str(folder) if beside else None,
            allowed_client_keys=() if beside else (keys.public,),
            num_threads=config.host_threads,
        )
        actor_options = self._options(f"host-{host}", bundle, config.gpus_per_host)
        return ray.remote(ExpertHostActor).options(**actor_options).remote(options)

    def _make_engine(self) -> Any:
        config, folder = self._config, self._parts.folder
        options = self._options("engine", 0, config.router_gpus)
        remote = ray.remote(EngineActor).options(**options, max_concurrency=4)
        return remote.remote(config.engine_options, f"ipc://{folder}/engine")

    def _clients_maker(
        self, placement: Placement, addresses: Sequence[HostAddress], keys: CurveKeys
    ) -> Callable[[], list[HostClient]]:
        config = self._config
        if config.hosts:
            return functools.partial(host_clients.connect, list(addresses), keys)
        return functools.partial(host_clients.in_process, config.model, placement.units_of(0), config.host_options(0))

    async def add_door(self, owner: str, options: dict[str, Any]) -> dict[str, Any]:
        """Start a gRPC door for a launcher beside the engine. Raises UserError when its port is taken."""
        config, folder = self._config, self._parts.folder
        placed = {**self._options(f"door-{owner}-{len(self._parts.doors)}", 0, 0), "num_cpus": 0}
        actor: Any = (
            ray.remote(DoorActor)
            .options(**placed)
            .remote(f"ipc://{folder}/engine", config.model, config.model_name, strict.from_dict(GrpcOptions, options))
        )
        door, parts = _Door(owner, actor, 0), self._parts
        parts.doors.append(door)
        try:
            started = await asyncio.wait_for(actor.start.remote(), config.start_timeout_s)
        except BaseException:
            ray.kill(actor)
            parts.doors = [d for d in parts.doors if d is not door]  # `stop` may have emptied the list meanwhile
            raise
        door.port = started["port"]
        return started

    # ---- life and death ----

    async def check(self) -> dict[str, str]:
        """Ask every part for its status at once; returns name -> reason of those that gave none."""
        parts = self._parts
        named = {f"host {i}": host for i, host in enumerate(parts.hosts)}
        named |= {"engine": parts.engine} | {
            f"door on port {door.port}": door.actor for door in parts.doors if door.port
        }
        reasons = await asyncio.gather(*(_ailment(actor) for actor in named.values()))
        return {name: reason for name, reason in zip(named, reasons, strict=True) if reason}

    async def drop_doors(self, owner: str, grace_s: float) -> None:
        """Drain and stop the doors of a launcher, all at once."""
        mine = [door for door in self._parts.doors if door.owner == owner]
        self._parts.doors = [door for door in self._parts.doors if door.owner != owner]
        await _stop_doors(mine, grace_s)

    async def stop(self, grace_s: float) -> None:
        """Drain and stop everything there is; what has not come up is killed. Repeating it is harmless."""
        came_up, self.stage = self.stage == "ready", "stopping"
        parts, self._parts = self._parts, _Parts()
        await _stop_doors(parts.doors, grace_s)
        if came_up:
            await _settle(parts.engine.drain.remote(grace_s), grace_s + STOP_TIMEOUT_S)
            await _settle(parts.engine.stop.remote(), STOP_TIMEOUT_S)
            await asyncio.gather(*(_settle(host.stop.remote(), STOP_TIMEOUT_S) for host in parts.hosts))
        for actor in (parts.engine, *parts.hosts):
            if actor is not None:
                ray.kill(actor)
        if parts.group is not None:
            remove_placement_group(parts.group)
        if parts.folder is not None:
            shutil.rmtree(parts.folder, ignore_errors=True)

    async def _in_time(self, work: Awaitable[T], otherwise: str) -> T:
        left_s = self._deadline_s - asyncio.get_running_loop().time()
        try:
            return await asyncio.wait_for(work, max(0.1, left_s))
        except asyncio.TimeoutError:
            raise UnavailableError(f"{otherwise} within {self._config.start_timeout_s:.0f} s") from None


async def _ailment(actor: Any) -> str:
    """Why an actor gives no status; "" when it does."""
    try:
        status: Mapping[str, Any] = await asyncio.wait_for(actor.status.remote(), STATUS_TIMEOUT_S)
    except asyncio.TimeoutError:
        return f"no answer within {STATUS_TIMEOUT_S:.0f} s"
    except ray.exceptions.RayError as error:
        return f"its process died ({type(error).__name__})"
    return "" if status.get("running", True) else "its loop has ended; its log says why"


async def _stop_doors(doors: Sequence[_Door], grace_s: float) -> None:
    await asyncio.gather(*(_settle(door.actor.stop.remote(grace_s), grace_s + STOP_TIMEOUT_S) for door in doors))
    for door in doors:
        ray.kill(door.actor)


async def _settle(stopped: Awaitable[Any], timeout_s: float) -> None:
    """Let an actor end by itself; whether it does or not, it is killed afterwards."""
    with contextlib.suppress(ray.exceptions.RayError, asyncio.TimeoutError):
        await asyncio.wait_for(stopped, timeout_s)


def _make_folder() -> Path:
    """A private folder for Unix sockets, inside the keeper's folder where there is one."""
    return Path(tempfile.mkdtemp(prefix="pregate-ipc-", dir=os.environ.get(RUN_DIR_VARIABLE)))


def _host_bundles_by_node(group: PlacementGroup) -> list[tuple[int, str]]:
    """Bundles of the hosts as (index, node id), those of one node side by side, so that host ids follow nodes."""
    nodes: Mapping[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return sorted(((index, node) for index, node in nodes.items() if index), key=lambda pair: (pair[1], pair[0]))


def _no_room(config: ServeConfig) -> str:
    wanted = f"{config.hosts} hosts with {config.gpus_per_host:g} GPUs each and an engine with {config.router_gpus:g}"
    return f"Ray found no room for {wanted} (the engine on this node)"
