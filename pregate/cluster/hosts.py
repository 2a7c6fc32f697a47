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

from pregate.base.log import get_logger
from pregate.cluster import clients, places
from pregate.cluster.actors import actor_name, actor_options, start_actor, tied
from pregate.cluster.config import ServeConfig
from pregate.cluster.part import STOP_TIMEOUT_S, Part, settle
from pregate.cluster.placement import Placement
from pregate.cluster.places import Place
from pregate.workers.host.actor import ActorOptions, ExpertHostActor
from pregate.workers.link.protocol import HostAddress
from pregate.workers.link.transport import CurveKeys

logger = get_logger(__name__)
Unit = tuple[int, int]
#: How long room is waited for on another node, before it is asked for anew.
ELSEWHERE_S = 60.0


class Hosts:
    """`tell(method, *arguments)` calls every engine that runs, and raises what a call failed with. Hosts are numbered
    from 0; those that are added come last, and those taken away are the last. `folder` is where Unix sockets lie;
    `changed` is called when what `saved` returns is another, and before what was there ends; `engine_node` gives Ray's
    id of the engines' node, or ""."""

    def __init__(
        self,
        config: ServeConfig,
        keys: CurveKeys,
        folder: Path,
        tell: Callable[..., Awaitable[list[Any]]],
        changed: Callable[[], None],
        engine_node: Callable[[], str],
    ) -> None:
        self._config, self._keys, self._folder, self._tell, self._changed = config, keys, folder, tell, changed
        self._engine_node = engine_node
        self._places: list[Place] = []
        self._units: list[frozenset[Unit]] = []  # that each holds, or is to when it is started again
        self._num_told = 0  # of so many the engine knows
        self._num_made: Counter[int] = Counter()  # processes that were each host
        self.placement: Placement | None = None
        self.parts: list[Part] = []
        self.addresses: dict[int, HostAddress] = {}
        #: Of every host, for people.
        self.info: list[dict[str, Any]] = []

    async def start(self, placement: Placement, reserved: list[Place]) -> None:
        """Start the first hosts, in the room that was reserved for them."""
        self.placement, self._places = placement, reserved
        self._units = [frozenset(placement.units_of(host)) for host in range(self._config.hosts)]
        self.parts = [self._part(host) for host in range(self._config.hosts)]
        await asyncio.gather(*map(self._start, self.parts, range(len(self.parts))))
        self._num_told = len(self.parts)

    async def reserve(self, num_hosts: int) -> None:
        """Have room for so many hosts, until as many are there and leave. UserError or UnavailableError without."""
        try:
            while len(self._places) < num_hosts:
                timeout_s = self._config.start_timeout_s
                reserved = await places.reserve(self._config, len(self._places) + 1, timeout_s, self._places)
                self._places.append(reserved)
        except BaseException:
            await self._drop(len(self.parts))
            raise

    def nodes(self, num_hosts: int) -> list[str]:
        """The node of each of the first `num_hosts` hosts, or of the room that is reserved for it."""
        return places.nodes_of(self._places[:num_hosts])

    async def add(self, target: Placement) -> None:
        """Start hosts until there are as many as `target` has, for which there is room, each with the units it is to
        serve; returns when the engine knows of them. Raises what a host failed with; then there are as many as before.
        """
        first = len(self.parts)
        try:
            for host in range(first, target.num_hosts):
                self._units.append(frozenset(target.units_of(host)))
                self.parts.append(self._part(host))
            await asyncio.gather(*(self._start(self.parts[host], host) for host in range(first, target.num_hosts)))
        except BaseException:
            await self._drop(first)
            raise
        self._num_told = target.num_hosts
        self._changed()
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
        self._changed()
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
        self._changed()
        await self._drop(num_hosts)

    def on_draining_nodes(self) -> list[int]:
        """Hosts whose nodes Ray is to take away."""
        draining = places.draining_nodes()
        return [host for host, node in enumerate(self.nodes(len(self.parts))) if node in draining] if draining else []

    async def move_elsewhere(self, host: int) -> None:
        """Let a process on another node be this host: it reads the units first, then engines turn to it, then the one
        there was is drained. Raises what kept it from that; then nothing has changed."""
        old_part, old_place = self.parts[host], self._places[host]
        self._places[host] = await places.reserve(self._config, len(self.parts), ELSEWHERE_S, self._places)
        part = self._part(host)
        try:
            await self._start(part, host)
        except BaseException:
            await part.stop(STOP_TIMEOUT_S, kindly=False)
            places.give_back([self._places[host]])
            self._places[host] = old_place
            raise
        self.parts[host] = part
        self._changed()
        await self.tell_of(host)
        await _drain(old_part)
        places.give_back([old_place])

    def saved(self) -> dict[str, Any]:
        """What `adopt` needs: of the hosts that the engine knows."""
        known = range(self._num_told)
        return {
            "keys": self._keys,
            "placement": self.placement,
            "places": self._places,
            "addresses": self.known,
            "hosts": [(self._units[host], self._num_made[host], self.parts[host].saved()) for host in known],
        }

    def adopt(self, saved: dict[str, Any]) -> None:
        """Take up hosts that run already; the room of others is given back, and they end with it."""
        self._keys, self.placement, self._places = saved["keys"], saved["placement"], saved["places"]
        self._num_told = len(saved["hosts"])
        for host, (units, num_made, actor) in enumerate(saved["hosts"]):
            self._units.append(units)
            self._num_made[host] = num_made
            self.parts.append(self._part(host))
            self.parts[host].adopt(*actor)
        for address in saved["addresses"]:
            self._note(address)
        self._give_back(self._num_told)

    async def agree(self) -> None:
        """Say to hosts and engines again what is to be, for who said it last may have died in the midst of it."""
        if self.placement is None or not self.parts:
            return
        hosts = range(len(self.parts))
        held = await asyncio.gather(
            *(self._hold(host, self.placement.units_of(host)) for host in hosts), return_exceptions=True
        )
        for host, error in zip(hosts, held, strict=True):
            if isinstance(error, BaseException):  # it is being started again
                logger.warning("host %d could not be told what it holds: %s", host, error)
        for lost in await self._tell("lost_hosts"):
            for host in hosts:
                if host >= len(lost) or lost[host]:  # it may have come, or come back, unheard
                    await self.tell_of(host)
        await self._tell("place", self.placement.copies, len(self.parts))

    async def stop(self, came_up: bool) -> None:
        """Stop all of them; those that have not come up are killed. Their room goes with the deployment's (strays)."""
        await asyncio.gather(*(part.stop(STOP_TIMEOUT_S, came_up) for part in self.parts))

    def client_maker(self, host: int) -> Callable[[], Any]:
        """What makes an engine's client of a host, in the engine's process."""
        return functools.partial(clients.connect, self.addresses[host], self._keys)

    @property
    def groups(self) -> list[Any]:
        """The placement groups they have room in."""
        return [group for group, _ in self._places]

    @property
    def known(self) -> tuple[HostAddress, ...]:
        """Of those the engine is to know, in order."""
        return tuple(self.addresses[host] for host in range(self._num_told))

    # ---- one host ----

    def _part(self, host: int) -> Part:
        make = functools.partial(self._make, host, self._places[host])
        return Part(f"host {host}", make, start_actor, self._came_back, self._config.start_timeout_s, None)

    async def _start(self, part: Part, host: int) -> None:
        self._note(await part.start())

    def _note(self, address: HostAddress) -> None:
        self.addresses[address.host_id] = address
        self.info[:] = [_describe(self.addresses[host]) for host in sorted(self.addresses)]

    async def _came_back(self, address: HostAddress) -> None:
        """Take note of a host that was started again; the engine hears of one that is new when it is added."""
        self._note(address)
        self._changed()
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
        await asyncio.gather(*map(_drain, gone))
        self._give_back(num_hosts)

    def _give_back(self, num_hosts: int) -> None:
        """Give back the room of all hosts but the first so many, and those that there were at the start."""
        keep = max(num_hosts, self._config.hosts)
        places.give_back(self._places[keep:])
        del self._places[keep:]

    def _make(self, host: int, place: Place, _: int) -> Any:
        """A host beside the engine speaks over a Unix socket; one elsewhere over TCP, encrypted with the keys.

        On a CPU, where memory is taken when it is written, there is room for its share of another host's experts.
        """
        config, units = self._config, tuple(sorted(self._units[host]))
        host_options, others = config.host_options(host), len(self.parts) - 1
        if host_options.spare_slots is None and config.device == "cpu" and others > 0:
            host_options = replace(host_options, spare_slots=-(-len(units) // others))
        options = ActorOptions(
            host=host_options,
            checkpoint=config.model,
            parent=config.parent,
            units=units,
            transport="nearest",
            ipc_folder=str(self._folder),
            engine_node=self._engine_node(),
            allowed_client_keys=(self._keys.public,),
            num_threads=config.host_threads,
            first_core=config.host_core(host) if config.engine.pin_cores else None,
            telemetry=config.telemetry,
        )
        role, self._num_made[host] = actor_name(f"host-{host}", self._num_made[host]), self._num_made[host] + 1
        placed = actor_options(config, role, place, config.gpus_per_host)
        return tied(ExpertHostActor).options(**placed, max_concurrency=4).remote(options)


def _describe(address: HostAddress) -> dict[str, Any]:
    return {"host_id": address.host_id, "endpoint": address.endpoint, "pid": address.pid, "node_ip": address.node_ip}


async def _drain(part: Part) -> None:
    """Let a host finish what it was asked for, and end."""
    if part.pulse is not None:
        await settle(part.actor.drain.remote(STOP_TIMEOUT_S), 2 * STOP_TIMEOUT_S)
    await part.stop(STOP_TIMEOUT_S, part.pulse is not None)
