"""The gRPC front doors of a deployment. One that dies is started again on its port, for the launcher it belongs to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pregate.cluster.part import STOP_TIMEOUT_S, Part
from pregate.router.doors.grpc_options import GrpcOptions


class _Door(Part):
    """Of a launcher; once it listens, `options` name the port it has."""

    def __init__(
        self, owner: str, options: GrpcOptions, make_actor: Callable[[GrpcOptions], Any], start_timeout_s: float
    ) -> None:
        super().__init__("a door", lambda _: make_actor(self.options), self._listen, None, start_timeout_s)
        self.owner, self.options = owner, options

    async def _listen(self, actor: Any) -> dict[str, Any]:
        started = await actor.start.remote()
        self.options = replace(self.options, port=started["port"])
        self.name = f"door on port {self.options.port}"
        return started


class Doors:
    """`make_actor` gives a new door's actor from a number of its own and its options."""

    def __init__(self, make_actor: Callable[[int, GrpcOptions], Any], start_timeout_s: float) -> None:
        self._make_actor, self._start_timeout_s = make_actor, start_timeout_s
        self.parts: Sequence[_Door] = ()
        self._num_made = 0

    def _make(self, options: GrpcOptions) -> Any:
        number, self._num_made = self._num_made, self._num_made + 1
        return self._make_actor(number, options)

    async def add(self, owner: str, options: GrpcOptions) -> dict[str, Any]:
        """Start a door for a launcher; returns its host and port. Raises UserError when its port is taken."""
        door = _Door(owner, options, self._make, self._start_timeout_s)
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
