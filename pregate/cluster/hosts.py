"""The expert hosts of a deployment: what each holds, where it runs, that the engine knows; more of them, and fewer."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pregate.base.errors import UnavailableError, UserError
from pregate.base.log import get_logger
from pregate.cluster import room, run_folder
from pregate.cluster.config import ServeConfig
from pregate.cluster.local_ray import NAMESPACE
from pregate.cluster.part import STOP_TIMEOUT_S, Part, settle
from pregate.cluster.placement import Placement
from pregate.workers.host.actor import ActorOptions, ExpertHostActor
from pregate.workers.link.protocol import HostAddress
from pregate.workers.link.transport import CurveKeys

logger = get_logger(__name__)
Unit = tuple[int, int]
#: A placement group and which of its bundles.
Place = tuple[PlacementGroup, int]


class Hosts:
    """`tell(method, *arguments)` calls every engine that runs, and raises what a call failed with. Hosts are numbered
    from 0; those that are added come last, and those taken away are the last. `folder` is where Unix sockets lie."""

    def __init__(
        self, config: ServeConfig, keys: CurveKeys, folder: Path, tell: Callable[..., Awaitable[list[Any]]]
    ) -> None:
        self._config, self._keys, self._folder, self._tell = config, keys, folder, tell
        self._places: list[Place] = []
        self._units: list[frozenset[Unit]] = []  # that each holds, or is to when it is started again
        self._num_told = 0  # of so many the engine knows
        self._num_made: Counter[int] = Counter()  # processes that were each host
        self.placement: Placement | None = None
        self.parts: list[Part] = []
        self.addresses: dict[int, HostAddress] = {}
        #: Of every host, for people.
        self.info: list[dict[str, Any]] = []

    async def start(self, placement: Placement, places: list[Place]) -> None:
        """Start the first hosts, in the room that was reserved for them."""
        self.placement, self._places = placement, places
        self._units = [frozenset(placement.units_of(host)) for host in range(self._config.hosts)]
        self.parts = [self._part(host) for host in range(self._config.hosts)]
        await asyncio.gather(*map(self._start, self.parts, range(len(self.parts))))
        self._num_told = len(self.parts)

    async def add(self, target: Placement) -> None:
        """Start hosts until there are as many as `target` has, each with the units it is to serve; returns when the
        engine knows of them. Raises what a host failed with; then there are as many as before."""
        first = len(self.parts)
        try:
            for host in range(first, target.num_hosts):
                if host == len(self._places):
                    self._places.append(await self._reserve())
                self._units.append(frozenset(target.units_of(host)))
                self.parts.append(self._part(host))
            await asyncio.gather(*(self._start(self.parts[host], host) for host in range(first, target.num_hosts)))
        except BaseException:
            await self._drop(first)
            raise
        self._num_told = target.num_hosts
        for host in range(first, target.num_hosts):
            await self.tell_of(host)

    async def move(self, placement: Placement) -> None:
        """Let hosts serve these units: first they read what they lack, then the engine sends rows there, then they let
        go of what is another's. Raises what a call failed with; then the old placement holds, or both do."""
        assert self.placement is not None, "hosts are placed when they start"
        now = [frozenset(placement.units_of(host)) for host in range(len(self.parts))]
        more = [host for host in range(len(self.parts)) if now[host] - self._units[host]]
        await asyncio.gather(*(self._hold(host, self._units[host] | now[host]) for host in more))
        await self._tell("place", placement.copies, len(self.parts))
        self.placement = placement
        less = [host for host in range(len(self.parts)) if self._units[host] - now[host]]
        held = await asyncio.gather(*(self._hold(host, now[host]) for host in less), return_exceptions=True)
        for host, error in zip(less, held, strict=True):
            if isinstance(error, BaseException):  # it holds more than it needs, or is being started again
                logger.warning("host %d did not let go of units: %s", host, error)

    async def leave(self, num_hosts: int) -> None:
        """Take away all hosts from `num_hosts` on, which serve nothing any more: each is drained first."""
        assert self.placement is not None and self.placement.copies.max() < num_hosts, "their units have other homes"
        await self._tell("place", self.placement.copies, num_hosts)
        self.placement, self._num_told = replace(self.placement, num_hosts=num_hosts), num_hosts
        await self._drop(num_hosts)

    async def stop(self, came_up: bool) -> None:
        """Stop all of them; those that have not come up are killed."""
        await asyncio.gather(*(part.stop(STOP_TIMEOUT_S, came_up) for part in self.parts))
        for group in {place[0] for place in self._places[self._config.hosts :]}:
            remove_placement_group(group)

    def client_maker(self, host: int) -> Callable[[], Any]:
        """What makes an engine's client of a host, in the engine's process."""
        return functools.partial(_connect, self.addresses[host], self._keys)

    @property
    def known(self) -> tuple[HostAddress, ...]:
        """Of those the engine is to know, in order."""
        return tuple(self.addresses[host] for host in range(self._num_told))

    # ---- one host ----

    def _part(self, host: int) -> Part:
        make = functools.partial(self._make, host)
        return Part(f"host {host}", make, start_actor, self._came_back, self._config.start_timeout_s, None)

    async def _start(self, part: Part, host: int) -> None:
        self._note(await part.start())

    def _note(self, address: HostAddress) -> None:
        self.addresses[address.host_id] = address
        self.info[:] = [_describe(self.addresses[host]) for host in sorted(self.addresses)]

    async def _came_back(self, address: HostAddress) -> None:
        """Take note of a host that was started again; the engine hears of one that is new when it is added."""
        self._note(address)
        if address.host_id < self._num_told:
            await self.tell_of(address.host_id)

    async def tell_of(self, host: int) -> None:
        """Let the engine greet a host; one that does not run, or starts, is told when it does."""
        try:
            await self._tell("replace_host", host, self.client_maker(host))
        except (ray.exceptions.RayError, asyncio.TimeoutError) as error:
            logger.warning("host %d: the engine could not be told: %s", host, type(error).__name__)

    async def _hold(self, host: int, units: Iterable[Unit]) -> None:
        self._units[host] = frozenset(units)
        held = self.parts[host].actor.hold.remote(sorted(self._units[host]))
        await asyncio.wait_for(held, self._config.start_timeout_s)

    async def _drop(self, num_hosts: int) -> None:
        """Drain and stop the hosts from `num_hosts` on; the room of those that were added is given back."""
        gone, self.parts = self.parts[num_hosts:], self.parts[:num_hosts]
        del self._units[num_hosts:]
        for host in [h for h in self.addresses if h >= num_hosts]:
            del self.addresses[host]
        del self.info[num_hosts:]
        for part in gone:
            if part.pulse is not None:
                await settle(part.actor.drain.remote(STOP_TIMEOUT_S), 2 * STOP_TIMEOUT_S)
        await asyncio.gather(*(part.stop(STOP_TIMEOUT_S, part.pulse is not None) for part in gone))
        keep = max(num_hosts, self._config.hosts)
        for group, _ in self._places[keep:]:
            remove_placement_group(group)
        del self._places[keep:]

    async def _reserve(self) -> Place:
        """Room for one more host. UserError where a Ray of our own has none, UnavailableError in time."""
        config = self._config
        bundle = room.bundles_of(config, "")[-1]
        if run_folder.own() is not None and room.lacking([bundle], [ray.available_resources()]):
            raise UserError.of("--hosts", len(self.parts) + 1, "the Ray that was started for this has no room for it")
        group = placement_group([bundle])
        try:
            await asyncio.wait_for(wait(group.ready()), config.start_timeout_s)
        except BaseException as error:
            remove_placement_group(group)
            if isinstance(error, asyncio.TimeoutError):
                reason = f"no room for another host within {config.start_timeout_s:.0f} s"
                raise UnavailableError(reason) from None
            raise
        return group, 0

    def _make(self, host: int, _: int) -> Any:
        """A host beside the engine speaks over a Unix socket; one elsewhere over TCP, encrypted with the keys.

        On a CPU, where memory is taken when it is written, there is room for its share of another host's experts.
        """
        config, units, (group, bundle) = self._config, tuple(sorted(self._units[host])), self._places[host]
        node = placement_group_table(group)["bundles_to_node_id"][bundle]
        host_options, others = config.host_options(host), len(self.parts) - 1
        if host_options.spare_slots is None and config.device == "cpu" and others > 0:
            host_options = replace(host_options, spare_slots=-(-len(units) // others))
        beside = node == ray.get_runtime_context().get_node_id()
        options = ActorOptions(
            host=host_options,
            checkpoint=config.model,
            parent=config.parent,
            units=units,
            transport="ipc" if beside else "tcp",
            ipc_folder=str(self._folder) if beside else None,
            allowed_client_keys=() if beside else (self._keys.public,),
            num_threads=config.host_threads,
            first_core=config.host_core(host) if config.engine.pin_cores else None,
            telemetry=config.telemetry,
        )
        role, self._num_made[host] = actor_name(f"host-{host}", self._num_made[host]), self._num_made[host] + 1
        placed = actor_options(config, role, (group, bundle), config.gpus_per_host)
        return ray.remote(ExpertHostActor).options(**placed, max_concurrency=4).remote(options)


def actor_options(config: ServeConfig, role: str, place: Place, num_gpus: float) -> dict[str, Any]:
    """Ray's options of an actor of ours."""
    return {
        "name": f"{config.name}/{role}",
        "namespace": NAMESPACE,
        "num_cpus": room.ACTOR_CPUS,
        "num_gpus": num_gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(*place),
    }


def actor_name(role: str, num_before: int) -> str:
    """The actor's name: those before may still be dying under theirs."""
    return f"{role}-again-{num_before}" if num_before else role


def _describe(address: HostAddress) -> dict[str, Any]:
    return {"host_id": address.host_id, "endpoint": address.endpoint, "pid": address.pid, "node_ip": address.node_ip}


async def wait(reference: Any) -> None:
    """What Ray's references are not by themselves: a coroutine."""
    await reference


async def start_actor(actor: Any) -> Any:
    """Bring an actor up that needs nothing for it."""
    return await actor.start.remote()


def _connect(address: HostAddress, keys: CurveKeys) -> Any:
    import zmq

    from pregate.workers.client.channel import ChannelClient
    from pregate.workers.client.channel_options import ChannelOptions

    return ChannelClient(address, ChannelOptions(keys=keys), zmq.Context.instance())
