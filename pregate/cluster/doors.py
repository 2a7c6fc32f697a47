"""The gRPC front doors of a deployment. One that dies is started again on its port, for the launcher it belongs to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pregate.base.network import is_everywhere, takes_connections
from pregate.cluster.part import STOP_TIMEOUT_S, Part
from pregate.router.doors.grpc_options import GrpcOptions

#: How often a door that starts looks whether it can.
LOOK_S = 0.2


class _Door(Part):
    """Of a launcher, which `asked` for it; once it listens, `options` name the port it has. It starts when what it
    speaks to is `ready`: all of it may have been lost at once."""

    def __init__(
        self,
        owner: str,
        options: GrpcOptions,
        make_actor: Callable[[GrpcOptions], Any],
        ready: Callable[[], bool],
        start_timeout_s: float,
    ) -> None:
        super().__init__("a door", lambda _: make_actor(self.options), self._listen, None, start_timeout_s)
        self.owner, self.asked, self.options, self._ready = owner, options, options, ready
        self.started: dict[str, Any] = {}

    async def _listen(self, actor: Any) -> dict[str, Any]:
        while not self._ready():
            await asyncio.sleep(LOOK_S)
        started = await actor.start.remote()
        self.runs_as(started)
        return started

    def runs_as(self, started: dict[str, Any]) -> None:
        """Take note of what it said at its start."""
        self.started, self.options = started, replace(self.options, port=started["port"])
        self.name = f"door on port {self.options.port}"

    async def _ended(self) -> None:
        """Its port is free when its process is gone; one that stands still takes Ray seconds."""
        give_up_s = time.monotonic() + STOP_TIMEOUT_S
        while self.started and time.monotonic() < give_up_s:
            if not await asyncio.to_thread(takes_connections, address_of(self.started), self.started["port"]):
                return
            await asyncio.sleep(LOOK_S)


def address_of(started: Mapping[str, Any]) -> str:
    """Where a door that said this at its start is found: on every interface, by its node's address."""
    return started["node"] if is_everywhere(started["host"]) and started.get("node") else started["host"]


class Doors:
    """`make_actor` gives a new door's actor from a number of its own and its options; `ready` says whether there is
    what it speaks to."""

    def __init__(
        self,
        make_actor: Callable[[int, GrpcOptions], Any],
        start_timeout_s: float,
        ready: Callable[[], bool] = lambda: True,
    ) -> None:
        self._make_actor, self._start_timeout_s, self._ready = make_actor, start_timeout_s, ready
        self.parts: Sequence[_Door] = ()
        self._num_made = 0

    def _make(self, options: GrpcOptions) -> Any:
        number, self._num_made = self._num_made, self._num_made + 1
        return self._make_actor(number, options)

    def _door(self, owner: str, options: GrpcOptions) -> _Door:
        return _Door(owner, options, self._make, self._ready, self._start_timeout_s)

    async def add(self, owner: str, options: GrpcOptions) -> dict[str, Any]:
        """Start a door for a launcher, unless it has one like that; returns its host and port. Raises UserError when
        its port is taken."""
        for door in self.parts:
            if door.started and (door.owner, door.asked) == (owner, options):
                return door.started
        door = self._door(owner, options)
        self.parts = (*self.parts, door)
        try:
            return await door.start()
        except BaseException:
            self.parts = [one for one in self.parts if one is not door]
            await door.stop(0, kindly=False)
            raise

    async def drop(self, owner: str, grace_s: float) -> None:
        """Drain and stop the doors of a launcher, all at once."""
        mine = [door for door in self.parts if door.owner == owner]
        self.parts = [door for door in self.parts if door.owner != owner]
        await asyncio.gather(*(door.stop(grace_s + STOP_TIMEOUT_S, True, grace_s) for door in mine))

    async def stop(self, grace_s: float) -> None:
        """Drain and stop all doors."""
        await asyncio.gather(*(self.drop(owner, grace_s) for owner in {door.owner for door in self.parts}))

    def saved(self) -> dict[str, Any]:
        """What `adopt` needs."""
        doors = [(d.owner, d.asked, d.started, d.saved()) for d in self.parts if d.started]
        return {"num_made": self._num_made, "doors": doors}

    def adopt(self, saved: dict[str, Any]) -> None:
        """Take up doors that run already."""
        self._num_made = saved["num_made"]
        for owner, asked, started, actor in saved["doors"]:
            door = self._door(owner, asked)
            door.runs_as(started)
            door.adopt(*actor)
            self.parts = (*self.parts, door)
