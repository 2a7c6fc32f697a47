"""What a supervisor owns, as Ray sees it: a placement group, host actors, engines, front doors, a socket folder.

Everything is created by the supervisor's process and not detached, so Ray takes it down when the supervisor dies.
Nothing here loads torch: the classes of the actors do so in their own processes.
"""

from __future__ import annotations

import asyncio
import functools
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from pregate.base.errors import UnavailableError, UserError
from pregate.base.log import get_logger
from pregate.base.metrics import OF_ENGINE, OF_PATHS
from pregate.base.options import from_dict, shown
from pregate.cluster import ray_metrics, room, run_folder
from pregate.cluster.config import ServeConfig
from pregate.cluster.doors import Doors
from pregate.cluster.hosts import Hosts, actor_name, actor_options, start_actor
from pregate.cluster.part import STOP_TIMEOUT_S, Part, settle
from pregate.cluster.placement import check, check_request
from pregate.cluster.places import nodes_of, wait
from pregate.cluster.pulse import look
from pregate.cluster.routed_experts import read_routed_experts
from pregate.cluster.scaling import Scaling
from pregate.cluster.supervisor import Health
from pregate.router.doors.door import DoorActor
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.router.link.actor import EngineActor
from pregate.router.paths.actor import PathActor
from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import HostAddress
from pregate.workers.link.transport import CurveKeys

#: How long an engine has to take note of something.
ASK_TIMEOUT_S = 30.0
#: How often the cluster is asked what room it has.
ROOM_EVERY_S = 2.0

logger = get_logger(__name__)
T = TypeVar("T")


class RayChildren:
    """The real `supervisor.Children`. Doors, path service and engines run on the supervisor's node, hosts anywhere.

    Every engine knows every host and has requests of its own; doors spread theirs over the engines.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.stage = "starting"
        self._config = config
        self._group: PlacementGroup | None = None
        self._keys = CurveKeys.new()
        self._folder = Path(tempfile.mkdtemp(prefix="pregate-ipc-", dir=run_folder.own()))  # of Unix sockets
        self._hosts = Hosts(config, self._keys, self._folder, self._tell)
        self._scaling: Scaling | None = None
        self._told: dict[int, tuple[HostAddress, ...]] = {}  # hosts that each engine knew at its start
        timeout_s = config.start_timeout_s
        self._engines = [self._engine_part(number) for number in range(config.engines)]
        self._paths: Part | None = None  # where the checkpoint has exact ones
        self._info: dict[str, Any] = {}
        self._doors = Doors(self._make_door, timeout_s)
        self._exports = False  # whether Ray exports metrics
        self._stopping: asyncio.Task[None] | None = None
        self._deadline_s = asyncio.get_running_loop().time() + timeout_s
        self._node_ip = ray.util.get_node_ip_address()

    async def start(self) -> dict[str, Any]:
        """Place and start hosts, then the engine. Raises what a part failed with, or UnavailableError in time."""
        config = self._config
        self._exports = await asyncio.to_thread(ray_metrics.exports)
        experts = read_routed_experts(config.model)
        for num_hosts in (config.hosts, config.max_hosts or 1):
            check_request(experts.num_routed, max(1, num_hosts), config.placement, config.replicas)
        self._group = group = await self._reserve()
        places = [(group, bundle) for bundle in _host_bundles_by_node(group)]
        placement = experts.placement(config, nodes=nodes_of(places))
        check(placement, experts.num_routed, experts.one_index)
        self.stage = f"loading {config.hosts} hosts" if config.hosts else "loading the engine"
        for engine in self._engines:
            engine.make()  # its process comes up while the hosts load
        if experts.exact_paths:
            paths = Part("the path service", self._make_paths, start_actor, self._know_paths, config.start_timeout_s)
            paths.make()
            self._paths = paths
        await self._in_time(self._hosts.start(placement, places), "the hosts did not load")
        self.stage = "loading the engine"
        loading = asyncio.gather(*(engine.start() for engine in self._engines))
        started = (await self._in_time(loading, "the engine did not load"))[0]
        paths_info = None
        if self._paths is not None:
            paths_info = await self._in_time(self._paths.start(), "the path service did not load")
        self.stage = "ready"
        endpoints = list(map(self._endpoint_of, range(config.engines)))
        self._info = {**started, "endpoints": endpoints, "node_ip": self._node_ip, "model_name": config.model_name}
        self._info |= {"hosts": self._hosts.info, "paths": paths_info}
        if config.hosts:
            self._scaling = Scaling(self._hosts, experts, config, self._tell)
        return self._info

    def _engine_part(self, number: int) -> Part:
        name = "the engine" if self._config.engines == 1 else f"engine {number}"
        make, start, know = (
            functools.partial(f, number) for f in (self._make_engine, self._start_engine, self._know_engine)
        )
        return Part(name, make, start, know, self._config.start_timeout_s)

    def _endpoint_of(self, engine: int) -> str:
        return f"ipc://{self._folder}/engine" + (f"-{engine}" if self._config.engines > 1 else "")

    async def _start_engine(self, number: int, actor: Any) -> dict[str, Any]:
        config, placement = self._config, self._hosts.placement
        assert placement is not None, "the engine starts after the hosts"
        while config.hosts and not any(host.pulse for host in self._hosts.parts):  # they died with the engine
            await asyncio.sleep(ROOM_EVERY_S / 10)
        self._told[number] = known = self._hosts.known
        if config.hosts:
            make_clients = functools.partial(_connect, [self._hosts.client_maker(n) for n in range(len(known))])
        else:
            make_clients = functools.partial(
                _in_process, config.model, config.parent, placement.units_of(0), config.host_options(0)
            )
        return await actor.start.remote(placement.copies, make_clients)

    async def _know_paths(self, started: dict[str, Any]) -> None:
        """Take note of a path service that was started again: it listens where the last one did."""
        self._info["paths"] = started

    async def _know_engine(self, number: int, started: dict[str, Any]) -> None:
        """The same of an engine; hosts that are back, or new, while it started are made known to it."""
        if number == 0:
            self._info |= started
        placement = self._hosts.placement
        for address in self._hosts.known:
            if address not in self._told[number]:
                await self._hosts.tell_of(address.host_id)
        if self._config.hosts and placement is not None:
            await self._tell("place", placement.copies, len(self._hosts.known))

    async def _tell(self, method: str, *arguments: Any) -> list[Any]:
        """Call every engine that runs; one that starts hears of everything when it has. Raises RayError or
        asyncio.TimeoutError where one fails, or none runs."""
        running = [engine for engine in self._engines if engine.pulse is not None] or self._engines[:1]
        told = [getattr(engine.actor, method).remote(*arguments) for engine in running]
        return await asyncio.gather(*(asyncio.wait_for(one, ASK_TIMEOUT_S) for one in told))

    async def scale(self, hosts: int) -> dict[str, Any]:
        """Change the number of hosts; see `Scaling.to`. UserError where the experts are in the engine's process."""
        if self._scaling is None:
            reason = "the experts are in the engine's process; start the deployment with --hosts 1 or more"
            raise UserError.of("--hosts", hosts, reason)
        return await self._scaling.to(hosts)

    # ---- making parts ----

    async def _reserve(self) -> PlacementGroup:
        """Wait for room, saying what is waited for. UserError at once where there never will be any."""
        config, bundles = self._config, room.bundles_of(self._config, self._node_ip)
        group = placement_group(bundles, strategy="PACK", name=f"pregate:{config.name}")
        self._group = group  # from here on `stop` removes it
        self.stage = f"reserving room for {config.hosts} hosts and the engine"
        ready = asyncio.ensure_future(wait(group.ready()))
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

    def _options(self, role: str, num_gpus: float = 0) -> dict[str, Any]:
        """Of an actor beside the engine."""
        assert self._group is not None, "there is room before there are actors"
        return actor_options(self._config, role, (self._group, 0), num_gpus)

    def _make_engine(self, number: int, num_before: int) -> Any:
        config, several = self._config, self._config.engines > 1
        role = actor_name(f"engine-{number}" if several else "engine", num_before)
        options = self._options(role, config.engine_gpus)
        remote = ray.remote(EngineActor).options(**options, max_concurrency=4)
        export = self._export(ray_metrics.follow, OF_ENGINE)
        own = number if several else None
        return remote.remote(config.engine_options, self._endpoint_of(number), config.telemetry, export, own)

    def _make_paths(self, num_before: int) -> Any:
        """The path service, beside the engine and the doors."""
        options = {**self._options(actor_name("paths", num_before)), "num_cpus": 0}
        remote = ray.remote(PathActor).options(**options, max_concurrency=4)
        config, export = self._config, self._export(ray_metrics.follow, OF_PATHS)
        return remote.remote(config.path_options, f"ipc://{self._folder}/paths", config.telemetry, export)

    def _make_door(self, number: int, options: GrpcOptions) -> Any:
        """A door beside the engine."""
        config = self._config
        placed = {**self._options(f"door-{number}"), "num_cpus": 0}
        folder = self._folder
        paths = None if self._paths is None else f"ipc://{folder}/paths"
        engines = list(map(self._endpoint_of, range(config.engines)))
        arguments = (engines, paths, config.text_path, config.model_name, options, shown(config))
        recorder = self._export(ray_metrics.RayRecorder)
        return ray.remote(DoorActor).options(**placed).remote(*arguments, config.telemetry, recorder)

    def _export(self, export: Callable[..., T], *arguments: Any) -> Callable[..., T] | None:
        """For a part of the deployment: how its numbers get to Ray's exporter, where there is one."""
        return functools.partial(export, self._config.model_name, *arguments) if self._exports else None

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
        notes += [] if self._scaling is None else self._scaling.look()
        return Health({part.name: part.lost for part in self._parts if part.lost}, notes)

    @property
    def _parts(self) -> list[Part]:
        paths = [] if self._paths is None else [self._paths]
        return [*self._hosts.parts, *self._engines, *paths, *self._doors.parts]

    async def stop(self, grace_s: float) -> None:
        """Drain and stop everything there is; what has not come up is killed. Repeating it waits for the first."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop(grace_s))
        await asyncio.shield(self._stopping)

    async def _stop(self, grace_s: float) -> None:
        came_up, self.stage = self.stage == "ready", "stopping"
        if self._scaling is not None:
            await self._scaling.stop()
        await self._doors.stop(grace_s)
        if self._paths is not None:  # the doors have drained: nobody asks for paths any more
            await self._paths.stop(STOP_TIMEOUT_S, came_up)
        running = [engine.actor for engine in self._engines if came_up and engine.pulse is not None]
        await asyncio.gather(*(settle(actor.drain.remote(grace_s), grace_s + STOP_TIMEOUT_S) for actor in running))
        await asyncio.gather(*(engine.stop(STOP_TIMEOUT_S, came_up) for engine in self._engines))
        await self._hosts.stop(came_up)
        if self._group is not None:
            remove_placement_group(self._group)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _in_time(self, work: Awaitable[T], otherwise: str) -> T:
        left_s = self._deadline_s - asyncio.get_running_loop().time()
        try:
            return await asyncio.wait_for(work, max(0.1, left_s))
        except asyncio.TimeoutError:
            raise UnavailableError(f"{otherwise} within {self._config.start_timeout_s:.0f} s") from None


def _host_bundles_by_node(group: PlacementGroup) -> list[int]:
    """Bundles of the hosts, those of one node side by side, so that host ids follow nodes."""
    nodes: Mapping[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return sorted(filter(None, nodes), key=lambda index: (nodes[index], index))


def _connect(make_clients: Sequence[Callable[[], Any]]) -> list[Any]:
    """One channel per host, in order. Runs in the engine's process."""
    return [make_client() for make_client in make_clients]


def _in_process(model: str, parent: str | None, units: Sequence[tuple[int, int]], options: HostOptions) -> list[Any]:
    """`--hosts 0`: one host, in the engine's process, that holds every unit."""
    from pregate.model.checkpoint import CheckpointReader
    from pregate.workers.client.host_client import InProcessClient
    from pregate.workers.host.host import ExpertHost

    return [InProcessClient(ExpertHost(CheckpointReader(model, parent), units, options, beside_engine=True))]
