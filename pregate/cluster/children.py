"""What a supervisor owns, as Ray sees it: a placement group, host actors, engines, front doors, a socket folder.

They outlive the supervisor's process, so that another adopts them, but not its actor (actors.py).
Nothing here loads torch: the classes of the actors do so in their own processes.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group

from pregate.base.errors import UnavailableError, UserError
from pregate.base.log import get_logger
from pregate.base.memory import available_bytes
from pregate.base.metrics import OF_PATHS
from pregate.base.options import from_dict, shown
from pregate.cluster import ray_metrics, room, run_folder
from pregate.cluster.actors import actor_name, actor_options, start_actor, tied
from pregate.cluster.config import ServeConfig
from pregate.cluster.doors import Doors
from pregate.cluster.engines import Engines
from pregate.cluster.hosts import Hosts
from pregate.cluster.joining import here
from pregate.cluster.owned import Health
from pregate.cluster.part import STOP_TIMEOUT_S, Part, settle
from pregate.cluster.placement import check, check_request
from pregate.cluster.places import host_places, in_thread, node_address, nodes_of, wait
from pregate.cluster.pulse import look
from pregate.cluster.routed_experts import RoutedExperts, read_routed_experts
from pregate.cluster.scaling import Scaling
from pregate.cluster.strays import end_strays, group_name, remove_folder
from pregate.router.doors.door import DoorActor
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.router.paths.actor import PathActor
from pregate.workers.link.transport import CurveKeys

#: How often the cluster is asked what room it has.
ROOM_EVERY_S = 2.0

logger = get_logger(__name__)
T = TypeVar("T")


class RayChildren:
    """The real `supervisor.Children`. Doors, path service and engines run on one node, the supervisor's or as
    `engine_node` says, hosts anywhere. Should Ray lose that node they come up together on another such node.

    Every engine knows every host and has requests of its own; doors spread theirs over the engines.
    """

    def __init__(self, config: ServeConfig, folder: Path, changed: Callable[[], None] = lambda: None) -> None:
        """`folder` is where Unix sockets lie; `changed` is called when what `saved` returns is another."""
        self.stage = "starting"
        self._config = config
        self._group: PlacementGroup | None = None
        self._folder = folder
        self._experts: RoutedExperts | None = None
        self._hosts = Hosts(config, CurveKeys.new(), folder, self._tell, changed, self._engine_node)
        self._scaling: Scaling | None = None
        self._info: dict[str, Any] = {}
        self._engines = Engines(config, folder, self._hosts, self._options, self._export, self._info)
        self._paths: Part | None = None  # where the checkpoint has exact ones
        timeout_s = config.start_timeout_s
        self._doors = Doors(self._make_door, timeout_s, self._serves)
        self._exports = False  # whether Ray exports metrics
        self._nodes: set[str] = set()  # where engines were, by Ray's ids: our folder is there
        self._stopping: asyncio.Task[None] | None = None
        self._agreeing: asyncio.Task[None] | None = None
        self._deadline_s = asyncio.get_running_loop().time() + timeout_s

    async def start(self) -> dict[str, Any]:
        """Place and start hosts, then the engine. Raises what a part failed with, or UnavailableError in time."""
        config = self._config
        if config.device == "cpu" and config.engine_node is None:
            config.engine.kv_cache_bytes(available_bytes())  # the engine is on this node: refused before hosts load
        self._exports = await asyncio.to_thread(ray_metrics.exports)
        self._experts = experts = read_routed_experts(config.model)
        for num_hosts in (config.hosts, config.max_hosts or 1):
            check_request(experts.num_routed, max(1, num_hosts), config.placement, config.replicas)
        end_strays(config.name)  # of a supervisor that is dead for good
        group = await self._reserve()
        places = host_places(group)
        self._nodes.add(self._engine_node())
        placement = experts.placement(config, nodes=nodes_of(places))
        check(placement, experts.num_routed, experts.one_index)
        self.stage = f"loading {config.hosts} hosts" if config.hosts else "loading the engine"
        for engine in self._engines.parts:
            engine.make()  # its process comes up while the hosts load
        if experts.exact_paths:
            self._paths = self._paths_part()
            self._paths.make()
        await self._in_time(self._hosts.start(placement, places), "the hosts did not load")
        self.stage = "loading the engine"
        loading = asyncio.gather(*(engine.start() for engine in self._engines.parts))
        started = (await self._in_time(loading, "the engine did not load"))[0]
        paths_info = None
        if self._paths is not None:
            paths_info = await self._in_time(self._paths.start(), "the path service did not load")
        self.stage = "ready"
        self._info |= {**started, "endpoints": self._engines.endpoints, "node_ip": node_address(self._engine_node())}
        self._info |= {"model_name": config.model_name, "hosts": self._hosts.info, "paths": paths_info}
        if config.hosts:
            self._scaling = Scaling(self._hosts, experts, config, self._tell)
        return self._info

    def saved(self) -> dict[str, Any]:
        """What `adopt` needs: whatever a supervisor could not find out by itself."""
        return {
            "group": self._group,
            "experts": self._experts,
            "exports": self._exports,
            "nodes": self._nodes,
            "info": self._info,
            "hosts": self._hosts.saved(),
            "engines": [engine.saved() for engine in self._engines.parts],
            "paths": self._paths and self._paths.saved(),
            "doors": self._doors.saved(),
        }

    def adopt(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Take up what another process of the supervisor had; `check` finds what has died since."""
        self._group, self._experts, self._exports = saved["group"], saved["experts"], saved["exports"]
        self._nodes = saved["nodes"]
        self._hosts.adopt(saved["hosts"])
        for engine, actor in zip(self._engines.parts, saved["engines"], strict=True):
            engine.adopt(*actor)
        if saved["paths"] is not None:
            self._paths = self._paths_part()
            self._paths.adopt(*saved["paths"])
        self._doors.adopt(saved["doors"])
        self._info |= {**saved["info"], "hosts": self._hosts.info}
        self.stage = "ready"
        self._agreeing = asyncio.ensure_future(self._agree())
        return self._info

    async def _agree(self) -> None:
        """End what was made in the last moment before the one before us died, and make sure all know the same; then
        hosts may come and go."""
        assert self._group is not None and self._experts is not None, "there is something to adopt"
        actors, groups = [part.actor for part in self._parts], [self._group, *self._hosts.groups]
        end_strays(self._config.name, actors, groups)
        try:
            await self._hosts.agree()
        except (ray.exceptions.RayError, asyncio.TimeoutError) as error:  # an engine that starts hears of everything
            logger.warning("the engines could not be told which hosts there are: %s", type(error).__name__)
        if self._config.hosts:
            self._scaling = Scaling(self._hosts, self._experts, self._config, self._tell)

    def _paths_part(self) -> Part:
        start_timeout_s = self._config.start_timeout_s
        return Part("the path service", self._make_paths, start_actor, self._know_paths, start_timeout_s)

    async def _know_paths(self, started: dict[str, Any]) -> None:
        """Take note of a path service that was started again: it listens where the last one did."""
        self._info["paths"] = started

    async def _tell(self, method: str, *arguments: Any) -> list[Any]:
        return await self._engines.tell(method, *arguments)

    async def scale(self, hosts: int) -> dict[str, Any]:
        """Change the number of hosts; see `Scaling.to`. UserError where the experts are in the engine's process."""
        if self._agreeing is not None:
            await asyncio.shield(self._agreeing)
        if self._scaling is None:
            reason = "the experts are in the engine's process; start the deployment with --hosts 1 or more"
            raise UserError.of("--hosts", hosts, reason)
        return await self._scaling.to(hosts)

    # ---- making parts ----

    async def _reserve(self) -> PlacementGroup:
        """Wait for room, saying what is waited for. UserError at once where there never will be any."""
        config, bundles = self._config, room.bundles_of(self._config, ray.util.get_node_ip_address())
        self._group = group = placement_group(
            bundles, strategy=config.host_nodes.upper(), name=group_name(config.name), lifetime="detached"
        )
        self.stage = f"reserving room for {config.hosts} hosts and the engine"
        ready = asyncio.ensure_future(wait(group.ready()))
        while not ready.done():
            nodes = [node["Resources"] for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
            has = room.describe(config, ray.cluster_resources(), ray.available_resources())
            lacks = room.lacking(bundles, nodes)
            if lacks and (run_folder.own() is not None or lacks.startswith("node:")):  # a Ray of our own does not grow
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

    def _engine_node(self) -> str:
        """Ray's id of the node of engines and doors; "" while Ray looks for one."""
        return nodes_of([(self._group, 0)])[0] if self._group is not None else ""

    def _serves(self) -> bool:
        """Whether there is what doors speak to."""
        paths = [] if self._paths is None else [self._paths]
        return all(part.pulse for part in paths) and any(engine.pulse for engine in self._engines.parts)

    def _make_paths(self, num_before: int) -> Any:
        """The path service, beside the engine and the doors."""
        options = {**self._options(actor_name("paths", num_before)), "num_cpus": 0}
        remote = tied(PathActor).options(**options, max_concurrency=4)
        config, export = self._config, self._export(ray_metrics.follow, OF_PATHS)
        return remote.remote(config.path_options, f"ipc://{self._folder}/paths", config.telemetry, export)

    def _make_door(self, number: int, options: GrpcOptions) -> Any:
        """A door beside the engine."""
        config = self._config
        placed = {**self._options(f"door-{number}"), "num_cpus": 0}
        folder = self._folder
        paths = None if self._paths is None else f"ipc://{folder}/paths"
        door = (config.text_path, config.model_name, options, shown(config), here)
        arguments = (self._engines.endpoints, paths, *door)
        recorder = self._export(ray_metrics.RayRecorder)
        return tied(DoorActor).options(**placed).remote(*arguments, config.telemetry, recorder)

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
        if notes and self._config.engine_node is not None:
            notes += await self._moved()
        notes += [] if self._scaling is None else self._scaling.look()
        return Health({part.name: part.lost for part in self._parts if part.lost}, notes)

    async def _moved(self) -> list[str]:
        """Say where engines and doors are now, if that is another node than before, or none."""
        before = self._info["node_ip"]

        def look() -> str:
            self._nodes.add(node := self._engine_node())
            return node_address(node)

        at = self._info["node_ip"] = await in_thread(look, before)
        if at == before:
            return []
        return [f"engines and doors {'go to node' if at else 'wait for a node:'} {at or self._config.engine_node}"]

    @property
    def _parts(self) -> list[Part]:
        paths = [] if self._paths is None else [self._paths]
        return [*self._hosts.parts, *self._engines.parts, *paths, *self._doors.parts]

    async def stop(self, grace_s: float) -> None:
        """Drain and stop everything there is; what has not come up is killed. Repeating it waits for the first."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop(grace_s))
        await asyncio.shield(self._stopping)

    async def _stop(self, grace_s: float) -> None:
        came_up, self.stage = self.stage == "ready", "stopping"
        if self._agreeing is not None:
            self._agreeing.cancel()
        if self._scaling is not None:
            await self._scaling.stop()
        await self._doors.stop(grace_s)
        if self._paths is not None:  # the doors have drained: nobody asks for paths any more
            await self._paths.stop(STOP_TIMEOUT_S, came_up)
        running = [engine.actor for engine in self._engines.parts if came_up and engine.pulse is not None]
        await asyncio.gather(*(settle(actor.drain.remote(grace_s), grace_s + STOP_TIMEOUT_S) for actor in running))
        await asyncio.gather(*(engine.stop(STOP_TIMEOUT_S, came_up) for engine in self._engines.parts))
        await self._hosts.stop(came_up)
        nodes = self._nodes | {self._engine_node()}
        end_strays(self._config.name)
        nodes -= {"", ray.get_runtime_context().get_node_id()}  # ours goes with the record
        await asyncio.gather(*(remove_folder(self._folder, node) for node in nodes))

    async def _in_time(self, work: Awaitable[T], otherwise: str) -> T:
        left_s = self._deadline_s - asyncio.get_running_loop().time()
        try:
            return await asyncio.wait_for(work, max(0.1, left_s))
        except asyncio.TimeoutError:
            raise UnavailableError(f"{otherwise} within {self._config.start_timeout_s:.0f} s") from None
