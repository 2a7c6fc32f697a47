"""The engines of a deployment: each knows every host, has requests of its own, and is started again when it dies."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pregate.base.metrics import OF_ENGINE, OF_NEXT_ENGINE
from pregate.cluster import clients, ray_metrics
from pregate.cluster.actors import actor_name, tied
from pregate.cluster.config import ServeConfig
from pregate.cluster.hosts import Hosts
from pregate.cluster.part import Part
from pregate.router.link.actor import EngineActor
from pregate.workers.link.protocol import HostAddress

#: How long an engine has to take note of something.
ASK_TIMEOUT_S = 30.0
#: How often an engine that starts looks whether a host runs.
LOOK_S = 0.2


class Engines:
    """`options(role, gpus)` are Ray's of an actor beside the doors, `export` as of `RayChildren`; `info` is what the
    first engine says of itself when it is started again, among other things. `folder` is where Unix sockets lie."""

    def __init__(
        self,
        config: ServeConfig,
        folder: Path,
        hosts: Hosts,
        options: Callable[[str, float], dict[str, Any]],
        export: Callable[..., Any],
        info: dict[str, Any],
    ) -> None:
        self._config, self._hosts, self._info = config, hosts, info
        self._options, self._export = options, export
        several = [f"-{number}" for number in range(config.engines)] if config.engines > 1 else [""]
        self.endpoints = [f"ipc://{folder}/engine{suffix}" for suffix in several]
        self._told: dict[int, tuple[HostAddress, ...]] = {}  # hosts that each engine knew at its start
        self.parts = [self._part(number) for number in range(config.engines)]

    async def tell(self, method: str, *arguments: Any) -> list[Any]:
        """Call every engine that runs; one that starts hears of everything when it has. Raises RayError or
        asyncio.TimeoutError where one fails, or none runs."""
        running = [engine for engine in self.parts if engine.pulse is not None] or self.parts[:1]
        told = [getattr(engine.actor, method).remote(*arguments) for engine in running]
        return await asyncio.gather(*(asyncio.wait_for(one, ASK_TIMEOUT_S) for one in told))

    def _part(self, number: int) -> Part:
        name = "the engine" if self._config.engines == 1 else f"engine {number}"
        make, start, know = (functools.partial(f, number) for f in (self._make, self._start, self._know))
        return Part(name, make, start, know, self._config.start_timeout_s)

    def _make(self, number: int, num_before: int) -> Any:
        config, several = self._config, self._config.engines > 1
        role = actor_name(f"engine-{number}" if several else "engine", num_before)
        remote = tied(EngineActor).options(**self._options(role, config.engine_gpus), max_concurrency=4)
        export = self._export(ray_metrics.follow, OF_NEXT_ENGINE if number else OF_ENGINE)
        own = number if several else None
        return remote.remote(config.engine_options, self.endpoints[number], config.telemetry, export, own)

    async def _start(self, number: int, actor: Any) -> dict[str, Any]:
        config, placement = self._config, self._hosts.placement
        assert placement is not None, "the engine starts after the hosts"
        while config.hosts and not any(host.pulse for host in self._hosts.parts):  # they died with the engine
            await asyncio.sleep(LOOK_S)
        self._told[number] = known = self._hosts.known
        if config.hosts:
            make_clients = functools.partial(
                clients.connect_all, [self._hosts.client_maker(n) for n in range(len(known))]
            )
        else:
            make_clients = functools.partial(
                clients.in_process, config.model, config.parent, placement.units_of(0), config.host_options(0)
            )
        return await actor.start.remote(placement.copies, make_clients)

    async def _know(self, number: int, started: dict[str, Any]) -> None:
        """Take note of an engine that was started again: it listens where the last one did. Hosts that are back, or
        new, while it started are made known to it."""
        if number == 0:
            self._info |= started
        placement = self._hosts.placement
        for address in self._hosts.known:
            if address not in self._told[number]:
                await self._hosts.tell_of(address.host_id)
        if self._config.hosts and placement is not None:
            await self.tell("place", placement.copies, len(self._hosts.known))
