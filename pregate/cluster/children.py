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
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pregate.base.errors import UnavailableError
from pregate.base.log import get_logger
from pregate.base.options import from_dict, shown
from pregate.cluster import room, run_folder
from pregate.cluster.config import ServeConfig
from pregate.cluster.doors import Doors
from pregate.cluster.local_ray import NAMESPACE
from pregate.cluster.part import STOP_TIMEOUT_S, Part, settle
from pregate.cluster.placement import Placement, check
from pregate.cluster.pulse import look
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

#: How long the engine has to take note of something.
ASK_TIMEOUT_S = 30.0
#: How often the cluster is asked what room it has.
ROOM_EVERY_S = 2.0

logger = get_logger(__name__)
T = TypeVar("T")


class RayChildren:
    """The real `supervisor.Children`. Doors, path service and engine run on the supervisor's node, hosts anywhere."""

    def __init__(self, config: ServeConfig) -> None:
        self.stage = "starting"
        self._config = config
        self._group: PlacementGroup | None = None
        self._folder: Path | None = None
        self._keys = CurveKeys.new()
        self._bundles: list[int] = []  # of the placement group, host by host
        self._placement: Placement | None = None
        timeout_s = config.start_timeout_s
        self._hosts = [
            Part(f"host {n}", functools.partial(self._make_host, n), _start, self._replace_host, timeout_s, None)
            for n in range(config.hosts)
        ]
        self._addresses: list[HostAddress] = []
        self._told: tuple[HostAddress, ...] = ()  # those the engine knew at its start
        self._engine = Part("the engine", self._make_engine, self._start_engine, self._know, timeout_s)
        self._paths: Part | None = None  # where the checkpoint has exact ones
        self._info: dict[str, Any] = {}
        self._doors = Doors(self._make_door, timeout_s)
        self._stopping: asyncio.Task[None] | None = None
        self._deadline_s = asyncio.get_running_loop().time() + timeout_s
        self._node_ip = ray.util.get_node_ip_address()

    async def start(self) -> dict[str, Any]:
        """Place and start hosts, then the engine. Raises what a part failed with, or UnavailableError in time."""
        config = self._config
        self._folder = Path(tempfile.mkdtemp(prefix="pregate-ipc-", dir=run_folder.own()))  # of Unix sockets
        experts = read_routed_experts(config.model)
        self._placement = placement = experts.placement(config)
        check(placement, experts.num_routed, experts.one_index)
        self._group = await self._reserve()
        self._bundles = _host_bundles_by_node(self._group)
        self.stage = f"loading {config.hosts} hosts" if config.hosts else "loading the engine"
        self._engine.make()  # its process comes up while the hosts load
        if experts.exact_paths:
            paths = Part("the path service", self._make_paths, _start, self._know, config.start_timeout_s)
            paths.make()
            self._paths = paths
        loading = asyncio.gather(*(host.start() for host in self._hosts))
        self._addresses = list(await self._in_time(loading, "the hosts did not load"))
        self.stage = "loading the engine"
        started = await self._in_time(self._engine.start(), "the engine did not load")
        paths_info = None
        if self._paths is not None:
            paths_info = await self._in_time(self._paths.start(), "the path service did not load")
        self.stage = "ready"
        hosts = [_describe(address) for address in self._addresses]
        self._info = {**started, "node_ip": self._node_ip, "model_name": config.model_name}
        self._info |= {"hosts": hosts, "paths": paths_info}
        return self._info

    async def _start_engine(self, actor: Any) -> dict[str, Any]:
        config, placement = self._config, self._placement
        assert placement is not None, "the engine starts after the hosts"
        while self._hosts and not any(host.pulse for host in self._hosts):  # they died with the engine
            await asyncio.sleep(ROOM_EVERY_S / 10)
        self._told = tuple(self._addresses)
        if self._hosts:
            make_clients = functools.partial(_connect, self._told, self._keys)
        else:
            make_clients = functools.partial(
                _in_process, config.model, config.parent, placement.units_of(0), config.host_options(0)
            )
        return await actor.start.remote(placement.copies, make_clients)

    async def _know(self, started: dict[str, Any]) -> None:
        """Take note of an engine or path service that was started again: it listens where the last one did."""
        if "info" in started:
            self._info |= started
            for address in set(self._addresses) - set(self._told):  # back while the engine started
                await self._tell(address)
        else:
            self._info["paths"] = started

    async def _replace_host(self, address: HostAddress) -> None:
        """Take note of a host that was started again, and tell the engine; one that starts is told afterwards."""
        self._addresses[address.host_id] = address
        self._info["hosts"][address.host_id] = _describe(address)
        if self._engine.pulse is not None:
            await self._tell(address)

    async def _tell(self, address: HostAddress) -> None:
        make_client = functools.partial(_connect_one, address, self._keys)
        try:
            told = self._engine.actor.replace_host.remote(address.host_id, make_client)
            await asyncio.wait_for(told, ASK_TIMEOUT_S)
        except (ray.exceptions.RayError, asyncio.TimeoutError) as error:  # a new engine will hear of it
            logger.warning("host %d: the engine could not be told: %s", address.host_id, type(error).__name__)

    # ---- making parts ----

    async def _reserve(self) -> PlacementGroup:
        """Wait for room, saying what is waited for. UserError at once where there never will be any."""
        config, bundles = self._config, room.bundles_of(self._config, self._node_ip)
        group = placement_group(bundles, strategy="PACK", name=f"pregate:{config.name}")
        self._group = group  # from here on `stop` removes it
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
        assert self._group is not None
        return {
            "name": f"{self._config.name}/{role}",
            "namespace": NAMESPACE,
            "num_cpus": room.ACTOR_CPUS,
            "num_gpus": num_gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, bundle),
        }

    def _make_host(self, host: int, num_before: int) -> Any:
        """A host beside the engine speaks over a Unix socket; one elsewhere over TCP, encrypted with the keys.

        On a CPU, where memory is taken when it is written, there is room for its share of another host's experts.
        """
        config, folder, placement, group = self._config, self._folder, self._placement, self._group
        assert placement is not None and group is not None, "hosts are made after they are placed"
        bundle, units = self._bundles[host], tuple(placement.units_of(host))
        node = placement_group_table(group)["bundles_to_node_id"][bundle]
        host_options = config.host_options(host)
        if host_options.spare_slots is None and config.device == "cpu" and config.hosts > 1:
            host_options = replace(host_options, spare_slots=-(-len(units) // (config.hosts - 1)))
        beside = node == ray.get_runtime_context().get_node_id()
        options = ActorOptions(
            host=host_options,
            checkpoint=config.model,
            parent=config.parent,
            units=units,
            transport="ipc" if beside else "tcp",
            ipc_folder=str(folder) if beside else None,
            allowed_client_keys=() if beside else (self._keys.public,),
            num_threads=config.host_threads,
            first_core=config.engine.threads + host * config.host_threads if config.engine.pin_cores else None,
        )
        actor_options = self._options(_named(f"host-{host}", num_before), bundle, config.gpus_per_host)
        return ray.remote(ExpertHostActor).options(**actor_options).remote(options)

    def _make_engine(self, num_before: int) -> Any:
        config, folder = self._config, self._folder
        options = self._options(_named("engine", num_before), 0, config.engine_gpus)
        remote = ray.remote(EngineActor).options(**options, max_concurrency=4)
        return remote.remote(config.engine_options, f"ipc://{folder}/engine")

    def _make_paths(self, num_before: int) -> Any:
        """The path service, beside the engine and the doors."""
        options = {**self._options(_named("paths", num_before), 0, 0), "num_cpus": 0}
        remote = ray.remote(PathActor).options(**options, max_concurrency=4)
        return remote.remote(self._config.path_options, f"ipc://{self._folder}/paths")

    def _make_door(self, number: int, options: GrpcOptions) -> Any:
        """A door beside the engine."""
        config = self._config
        placed = {**self._options(f"door-{number}", 0, 0), "num_cpus": 0}
        folder = self._folder
        paths = None if self._paths is None else f"ipc://{folder}/paths"
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
        """Look after every part at once; whatever died is started again."""
        await look(part.pulse for part in self._parts if part.pulse is not None)
        if self._stopping is not None:
            return Health()
        notes = [note for part in self._parts for note in part.check()]
        return Health({part.name: part.lost for part in self._parts if part.lost}, notes)

    @property
    def _parts(self) -> list[Part]:
        return [*self._hosts, self._engine, *([] if self._paths is None else [self._paths]), *self._doors.parts]

    async def stop(self, grace_s: float) -> None:
        """Drain and stop everything there is; what has not come up is killed. Repeating it waits for the first."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop(grace_s))
        await asyncio.shield(self._stopping)

    async def _stop(self, grace_s: float) -> None:
        came_up, self.stage = self.stage == "ready", "stopping"
        await self._doors.stop(grace_s)
        if self._paths is not None:  # the doors have drained: nobody asks for paths any more
            await self._paths.stop(STOP_TIMEOUT_S, came_up)
        if came_up and self._engine.pulse is not None:
            await settle(self._engine.actor.drain.remote(grace_s), grace_s + STOP_TIMEOUT_S)
        await self._engine.stop(STOP_TIMEOUT_S, came_up)
        await asyncio.gather(*(host.stop(STOP_TIMEOUT_S, came_up) for host in self._hosts))
        if self._group is not None:
            remove_placement_group(self._group)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _in_time(self, work: Awaitable[T], otherwise: str) -> T:
        left_s = self._deadline_s - asyncio.get_running_loop().time()
        try:
            return await asyncio.wait_for(work, max(0.1, left_s))
        except asyncio.TimeoutError:
            raise UnavailableError(f"{otherwise} within {self._config.start_timeout_s:.0f} s") from None


async def _wait(reference: Any) -> None:
    await reference


async def _start(actor: Any) -> Any:
    return await actor.start.remote()


def _named(role: str, num_before: int) -> str:
    """The actor's name: those before may still be dying under theirs."""
    return f"{role}-again-{num_before}" if num_before else role


def _host_bundles_by_node(group: PlacementGroup) -> list[int]:
    """Bundles of the hosts, those of one node side by side, so that host ids follow nodes."""
    nodes: Mapping[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return sorted(filter(None, nodes), key=lambda index: (nodes[index], index))


def _describe(address: HostAddress) -> dict[str, Any]:
    return {"host_id": address.host_id, "endpoint": address.endpoint, "pid": address.pid, "node_ip": address.node_ip}


def _connect(addresses: Sequence[HostAddress], keys: CurveKeys) -> list[Any]:
    """One channel per host, in the order of the addresses. Runs in the engine's process."""
    return [_connect_one(address, keys) for address in addresses]


def _connect_one(address: HostAddress, keys: CurveKeys) -> Any:
    import zmq

    from pregate.workers.client.channel import ChannelClient
    from pregate.workers.client.channel_options import ChannelOptions

    return ChannelClient(address, ChannelOptions(keys=keys), zmq.Context.instance())


def _in_process(model: str, parent: str | None, units: Sequence[tuple[int, int]], options: HostOptions) -> list[Any]:
    """`--hosts 0`: one host, in the engine's process, that holds every unit."""
    from pregate.model.checkpoint import CheckpointReader
    from pregate.workers.client.host_client import InProcessClient
    from pregate.workers.host.host import ExpertHost

    return [InProcessClient(ExpertHost(CheckpointReader(model, parent), units, options, beside_engine=True))]
