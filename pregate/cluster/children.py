"""What a supervisor owns, as Ray sees it: a placement group, host actors, an engine, front doors, a socket folder.

Everything is created by the supervisor's process and not detached, so Ray takes it down when the supervisor dies.
Nothing here loads torch: the classes of the actors do so in their own processes.
"""

from __future__ import annotations

import asyncio
import functools
import shutil
import tempfile
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pregate.base.errors import UnavailableError
from pregate.base.log import get_logger
from pregate.base.options import from_dict, shown
from pregate.cluster import room, run_folder
from pregate.cluster.config import ServeConfig
from pregate.cluster.doors import STOP_TIMEOUT_S, Doors, settle
from pregate.cluster.local_ray import NAMESPACE
from pregate.cluster.placement import Placement, check
from pregate.cluster.pulse import Pulse, look
from pregate.cluster.routed_experts import read_routed_experts
from pregate.cluster.supervisor import Health
from pregate.router.doors.door import DoorActor
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.router.link.actor import EngineActor
from pregate.router.paths.actor import PathActor
from pregate.workers.host.actor import ActorOptions, ExpertHostActor
from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import HostAddress
from pregate.workers.link.transport import CurveKeys

#: How often the cluster is asked what room it has.
ROOM_EVERY_S = 2.0

logger = get_logger(__name__)
T = TypeVar("T")


@dataclass
class _Parts:
    """What exists at the moment; `stop` takes down exactly this."""

    group: PlacementGroup | None = None
    folder: Path | None = None
    hosts: list[Any] = field(default_factory=list)
    engine: Any = None
    paths: Any = None  # where the checkpoint has exact ones
    pulses: dict[str, Pulse] = field(default_factory=dict)


class RayChildren:
    """The real `supervisor.Children`. Doors, path service and engine run on the supervisor's node, hosts anywhere."""

    def __init__(self, config: ServeConfig) -> None:
        self.stage = "starting"
        self._config = config
        self._parts = _Parts()
        self._doors = Doors(self._make_door, config.start_timeout_s)
        self._stopping: asyncio.Task[None] | None = None
        self._deadline_s = asyncio.get_running_loop().time() + config.start_timeout_s
        self._node_ip = ray.util.get_node_ip_address()

    async def start(self) -> dict[str, Any]:
        """Place and start hosts, then the engine. Raises what a part failed with, or UnavailableError in time."""
        config, parts = self._config, self._parts
        parts.folder = Path(tempfile.mkdtemp(prefix="pregate-ipc-", dir=run_folder.own()))  # of Unix sockets
        experts = read_routed_experts(config.model)
        placement = experts.placement(config)
        check(placement, experts.num_routed, experts.one_index)
        parts.group = await self._reserve()
        keys = CurveKeys.new()
        self.stage = f"loading {config.hosts} hosts" if config.hosts else "loading the engine"
        parts.engine = self._make_engine()  # its process comes up while the hosts load
        parts.paths = self._make_paths() if experts.exact_paths else None
        for host, (bundle, node) in enumerate(_host_bundles_by_node(parts.group)):
            parts.hosts.append(self._make_host(host, bundle, node, placement, keys))
        addresses: list[HostAddress] = await self._in_time(
            asyncio.gather(*(host.start.remote() for host in parts.hosts)), "the hosts did not load"
        )
        self.stage = "loading the engine"
        if config.hosts:
            make_clients = functools.partial(_connect, addresses, keys)
        else:
            make_clients = functools.partial(
                _in_process, config.model, config.parent, placement.units_of(0), config.host_options(0)
            )
        started = await self._in_time(
            parts.engine.start.remote(placement.copies, make_clients), "the engine did not load"
        )
        paths = None
        if parts.paths is not None:
            paths = await self._in_time(parts.paths.start.remote(), "the path service did not load")
        self.stage = "ready"
        named = {f"host {i}": host for i, host in enumerate(parts.hosts)} | {"the engine": parts.engine}
        named |= {"the path service": parts.paths} if parts.paths is not None else {}
        parts.pulses = {name: Pulse(actor) for name, actor in named.items()}
        hosts = [{"host_id": a.host_id, "endpoint": a.endpoint, "pid": a.pid, "node_ip": a.node_ip} for a in addresses]
        return {**started, "node_ip": self._node_ip, "model_name": config.model_name, "hosts": hosts, "paths": paths}

    # ---- making parts ----

    async def _reserve(self) -> PlacementGroup:
        """Wait for room, saying what is waited for. UserError at once where there never will be any."""
        config, bundles = self._config, room.bundles_of(self._config, self._node_ip)
        group = placement_group(bundles, strategy="PACK", name=f"pregate:{config.name}")
        self._parts.group = group  # from here on `stop` removes it
        self.stage = f"reserving room for {config.hosts} hosts and the engine"
        ready = asyncio.ensure_future(_wait(group.ready()))
        while not ready.done():
            nodes = [node["Resources"] for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
            has = room.describe(config, ray.cluster_resources(), ray.available_resources())
            lacks = room.lacking(bundles, nodes)
            if lacks and run_folder.own() is not None:  # a Ray of our own: it does not grow
                raise room.refusal(config, lacks, has)
            await self._in_time(asyncio.wait([ready], timeout=ROOM_EVERY_S), f"no room for {has}")
            if not ready.done():
                self.stage = f"waiting for the cluster to {'grow' if lacks else 'have room'}: {has}"
        if (error := ready.exception()) is not None:
            raise UnavailableError(f"the room reserved for {config.name!r} was taken away: {error}") from error
        return group

    def _options(self, role: str, bundle: int, num_gpus: float) -> dict[str, Any]:
        assert self._parts.group is not None
        return {
            "name": f"{self._config.name}/{role}",
            "namespace": NAMESPACE,
            "num_cpus": room.ACTOR_CPUS,
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
            parent=config.parent,
            units=tuple(placement.units_of(host)),
            transport="ipc" if beside else "tcp",
            ipc_folder=str(folder) if beside else None,
            allowed_client_keys=() if beside else (keys.public,),
            num_threads=config.host_threads,
            first_core=config.engine.threads + host * config.host_threads if config.engine.pin_cores else None,
        )
        actor_options = self._options(f"host-{host}", bundle, config.gpus_per_host)
        return ray.remote(ExpertHostActor).options(**actor_options).remote(options)

    def _make_engine(self) -> Any:
        config, folder = self._config, self._parts.folder
        options = self._options("engine", 0, config.engine_gpus)
        remote = ray.remote(EngineActor).options(**options, max_concurrency=4)
        return remote.remote(config.engine_options, f"ipc://{folder}/engine")

    def _make_paths(self) -> Any:
        """The path service, beside the engine and the doors."""
        options = {**self._options("paths", 0, 0), "num_cpus": 0}
        remote = ray.remote(PathActor).options(**options, max_concurrency=4)
        return remote.remote(self._config.path_options, f"ipc://{self._parts.folder}/paths")

    def _make_door(self, number: int, options: GrpcOptions) -> Any:
        """A door beside the engine."""
        config = self._config
        placed = {**self._options(f"door-{number}", 0, 0), "num_cpus": 0}
        folder = self._parts.folder
        paths = None if self._parts.paths is None else f"ipc://{folder}/paths"
        arguments = (f"ipc://{folder}/engine", paths, config.text_path, config.model_name, options, shown(config))
        return ray.remote(DoorActor).options(**placed).remote(*arguments)

    async def add_door(self, owner: str, options: dict[str, Any]) -> dict[str, Any]:
        """Start a gRPC door for a launcher. Raises UserError when its port is taken."""
        return await self._doors.add(owner, from_dict(GrpcOptions, options))

    async def drop_doors(self, owner: str, grace_s: float) -> None:
        """Drain and stop the doors of a launcher, all at once."""
        await self._doors.drop(owner, grace_s)

    # ---- life and death ----

    async def check(self) -> Health:
        """Look after every part at once; a front door that died is started again."""
        pulses = self._parts.pulses
        (lost_doors, notes), _ = await asyncio.gather(self._doors.check(), look(pulses.values()))
        lost = {name: pulse.lost for name, pulse in pulses.items() if pulse.lost}
        notes += [f"{name}: {news}" for name, pulse in sorted(pulses.items()) if (news := pulse.news())]
        return Health({**lost, **lost_doors}, notes)

    async def stop(self, grace_s: float) -> None:
        """Drain and stop everything there is; what has not come up is killed. Repeating it waits for the first."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop(grace_s))
        await asyncio.shield(self._stopping)

    async def _stop(self, grace_s: float) -> None:
        came_up, self.stage = self.stage == "ready", "stopping"
        parts, self._parts = self._parts, _Parts()
        await self._doors.stop(grace_s)
        if came_up:
            if parts.paths is not None:  # the doors have drained: nobody asks for paths any more
                await settle(parts.paths.stop.remote(), STOP_TIMEOUT_S)
            await settle(parts.engine.drain.remote(grace_s), grace_s + STOP_TIMEOUT_S)
            await settle(parts.engine.stop.remote(), STOP_TIMEOUT_S)
            await asyncio.gather(*(settle(host.stop.remote(), STOP_TIMEOUT_S) for host in parts.hosts))
        for actor in (parts.engine, parts.paths, *parts.hosts):
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


async def _wait(reference: Any) -> None:
    await reference


def _host_bundles_by_node(group: PlacementGroup) -> list[tuple[int, str]]:
    """Bundles of the hosts as (index, node id), those of one node side by side, so that host ids follow nodes."""
    nodes: Mapping[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return sorted(((index, node) for index, node in nodes.items() if index), key=lambda pair: (pair[1], pair[0]))


def _connect(addresses: Sequence[HostAddress], keys: CurveKeys) -> list[Any]:
    """One channel per host, in the order of the addresses. Runs in the engine's process."""
    import zmq

    from pregate.workers.client.channel import ChannelClient
    from pregate.workers.client.channel_options import ChannelOptions

    context = zmq.Context()
    return [ChannelClient(address, ChannelOptions(keys=keys), context) for address in addresses]


def _in_process(model: str, parent: str | None, units: Sequence[tuple[int, int]], options: HostOptions) -> list[Any]:
    """`--hosts 0`: one host, in the engine's process, that holds every unit."""
    from pregate.model.checkpoint import CheckpointReader
    from pregate.workers.client.host_client import InProcessClient
    from pregate.workers.host.host import ExpertHost

    return [InProcessClient(ExpertHost(CheckpointReader(model, parent), units, options, beside_engine=True))]
