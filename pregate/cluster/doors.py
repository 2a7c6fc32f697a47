"""The gRPC front doors of a deployment. One that dies is started again on its port, for the launcher it belongs to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.exceptions

from pregate.base.log import get_logger
from pregate.cluster.pulse import Pulse, look
from pregate.router.doors.grpc_options import GrpcOptions

STOP_TIMEOUT_S = 10.0
#: A door that died this often in a row, each time within `STEADY_AFTER_S`, is lost for good.
MAX_RESTARTS = 3
STEADY_AFTER_S = 60.0

logger = get_logger(__name__)


@dataclass(eq=False)
class _Door:
    """`port` is 0 until it listens, `restarts` counts those since it last ran steadily."""

    owner: str
    options: GrpcOptions
    actor: Any = None
    pulse: Pulse | None = None
    port: int = 0
    started_s: float = 0.0
    restarts: int = 0
    restarting: asyncio.Task[None] | None = None
    lost: str = ""


class Doors:
    """`make_actor` gives a new door's actor from a number of its own and its options."""

    def __init__(self, make_actor: Callable[[int, GrpcOptions], Any], start_timeout_s: float) -> None:
        self._make_actor = make_actor
        self._start_timeout_s = start_timeout_s
        self._doors: list[_Door] = []
        self._num_made = 0

    async def add(self, owner: str, options: GrpcOptions) -> dict[str, Any]:
        """Start a door for a launcher; returns its host and port. Raises UserError when its port is taken."""
        door = _Door(owner, options)
        self._doors.append(door)
        try:
            return await self._start(door)
        except BaseException:
            if door in self._doors:  # `stop` may have emptied the list meanwhile
                self._doors.remove(door)
            raise

    async def _start(self, door: _Door) -> dict[str, Any]:
        door.actor, self._num_made = self._make_actor(self._num_made, door.options), self._num_made + 1
        try:
            started = await asyncio.wait_for(door.actor.start.remote(), self._start_timeout_s)
        except BaseException:
            ray.kill(door.actor)
            raise
        door.port, door.started_s, door.pulse = started["port"], time.monotonic(), Pulse(door.actor)
        door.options = replace(door.options, port=door.port)
        return started

    async def check(self) -> tuple[dict[str, str], list[str]]:
        """Start doors again that died. Returns which are lost for good and why, and what happened besides."""
        notes = []
        watched = [door for door in self._doors if door.pulse is not None and door.restarting is None]
        await look(door.pulse for door in watched if door.pulse is not None)
        for door in watched:
            if door.pulse is None or door not in self._doors:
                continue
            if news := door.pulse.news():
                notes.append(f"door on port {door.port}: {news}")
            if not door.pulse.lost:
                continue
            notes.append(f"door on port {door.port}: {door.pulse.lost}; a new one is started")
            door.restarts = 0 if time.monotonic() - door.started_s > STEADY_AFTER_S else door.restarts
            door.restarting = asyncio.ensure_future(self._restart(door, door.pulse.lost))
        return {f"door on port {door.port}": door.lost for door in self._doors if door.lost}, notes

    async def _restart(self, door: _Door, reason: str) -> None:
        while door.restarts < MAX_RESTARTS and door in self._doors:
            door.restarts += 1
            try:
                await self._start(door)
            except Exception as error:  # noqa: BLE001 - whatever it is, the door is not lost without a word
                cause = getattr(error, "cause", None) or error
                late = isinstance(error, asyncio.TimeoutError)
                reason = "it did not start in time" if late else f"{type(cause).__name__}: {cause}".splitlines()[0]
                logger.warning("door on port %d did not start again: %s", door.port, reason)
                continue
            door.restarting = None
            return
        door.lost = reason

    async def drop(self, owner: str, grace_s: float) -> None:
        """Drain and stop the doors of a launcher, all at once."""
        mine = [door for door in self._doors if door.owner == owner]
        self._doors = [door for door in self._doors if door.owner != owner]
        await self._stop(mine, grace_s)

    async def stop(self, grace_s: float) -> None:
        """Drain and stop all doors."""
        doors, self._doors = self._doors, []
        await self._stop(doors, grace_s)

    async def _stop(self, doors: Sequence[_Door], grace_s: float) -> None:
        actors = [door.actor for door in doors if door.actor is not None]
        await asyncio.gather(*(settle(actor.stop.remote(grace_s), grace_s + STOP_TIMEOUT_S) for actor in actors))
        for actor in actors:
            ray.kill(actor)


async def settle(stopped: Awaitable[Any], timeout_s: float) -> None:
    """Let an actor end by itself; whether it does or not, it is killed afterwards."""
    with contextlib.suppress(ray.exceptions.RayError, asyncio.TimeoutError):
        await asyncio.wait_for(stopped, timeout_s)
