"""`Part`: one actor of a deployment, which is started again when it dies or freezes."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray
import ray.exceptions

from pregate.base.backoff import Backoff
from pregate.base.log import get_logger
from pregate.cluster.pulse import Pulse
from pregate.workers.client.silence import Silence

#: A part that gives no answer for this long is frozen: it is killed, and another takes its place. A stop of 20 s is to
#: be survived, on a machine that is late, too; doors wait for twice as long (`EngineClientOptions.frozen_s`).
FROZEN_S = 30.0
#: Before it is started again: nothing the first time, then this, doubled up to `MAX_PAUSE_S`.
FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
#: How long one that is asked to stop may take besides what it drains.
STOP_TIMEOUT_S = 10.0

#: So much of the time between two looks counts as silence at most.
MOST_S = 3.0

logger = get_logger(__name__)


class Part:
    """`make_actor` makes its actor, given how many it had before; `start_actor` brings it up and returns what others
    need to know of it, and `came_back` tells them when that is another one than at first.

    After `max_restarts` attempts since it last ran steadily it is `lost` for good, and says why.
    """

    def __init__(
        self,
        name: str,
        make_actor: Callable[[int], Any],
        start_actor: Callable[[Any], Awaitable[Any]],
        came_back: Callable[[Any], Awaitable[None]] | None,
        start_timeout_s: float,
        max_restarts: int | None = 3,
    ) -> None:
        self.name, self.lost = name, ""
        self._make_actor, self._start_actor, self._came_back = make_actor, start_actor, came_back
        self._start_timeout_s, self._num_made = start_timeout_s, 0
        self._backoff = Backoff(FIRST_PAUSE_S, MAX_PAUSE_S, num_free=1, most=max_restarts)
        self._restarting: asyncio.Task[None] | None = None
        self._back: list[str] = []
        self._silence = Silence(MOST_S)  # time in which we ourselves were stopped is not its fault
        self.actor: Any = None
        #: None while it does not run.
        self.pulse: Pulse | None = None

    def make(self) -> None:
        """Make its actor; the process comes up by itself meanwhile."""
        self.actor, self._num_made = self._make_actor(self._num_made), self._num_made + 1

    def saved(self) -> tuple[Any, int]:
        """What `adopt` needs: its actor, and how many it had."""
        return self.actor, self._num_made

    def adopt(self, actor: Any, num_made: int) -> None:
        """Look after an actor that was brought up by somebody else; should it not run, `check` finds that."""
        self.actor, self._num_made, self.pulse = actor, num_made, Pulse(actor)
        self._backoff.runs(time.monotonic())

    async def start(self) -> Any:
        """Bring it up. Raises what it failed with, or asyncio.TimeoutError."""
        if self.actor is None:
            self.make()
        started = await asyncio.wait_for(self._start_actor(self.actor), self._start_timeout_s)
        self.pulse = Pulse(self.actor)
        self._backoff.runs(time.monotonic())
        self._silence.end()
        return started

    def check(self) -> list[str]:
        """Read what its pulse says; start it again where that is bad. Returns what happened, a sentence each."""
        pulse, (back, self._back) = self.pulse, (self._back, [])
        if pulse is None or self._restarting is not None:
            return back
        notes = [*back, f"{self.name}: {news}"] if (news := pulse.news()) else back
        if not pulse.silent_s:
            self._silence.end()
        frozen = pulse.silent_s > 0 and self._silence.count() > FROZEN_S
        reason = pulse.lost or (f"no answer for {FROZEN_S:.0f} s" if frozen else "")
        if reason:
            notes.append(f"{self.name}: {reason}; a new one is started")
            self.pulse, self._restarting = None, asyncio.ensure_future(self._restart(reason))
        return notes

    async def _restart(self, reason: str) -> None:
        """Try again and again, with longer and longer pauses."""
        while (pause_s := self._backoff.failed(time.monotonic())) < math.inf:
            ray.kill(self.actor)
            await self._ended()
            await asyncio.sleep(pause_s)
            try:
                self.make()
                started = await self.start()
                if self._came_back is not None:
                    await self._came_back(started)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next attempt may do better
                self.pulse, cause = None, getattr(error, "cause", None) or error
                late = isinstance(error, asyncio.TimeoutError)
                said = f"not within {self._start_timeout_s:.0f} s" if late else f"{type(cause).__name__}: {cause}"
                reason = f"it did not start again: {said}".splitlines()[0]
                logger.warning("%s: %s", self.name, reason)
                continue
            self._back.append(f"{self.name}: runs again")
            self._restarting = None
            return
        self.lost = reason

    async def _ended(self) -> None:
        """Wait for a process that was killed to have let go of what the next one needs."""

    async def stop(self, timeout_s: float, kindly: bool = True, *arguments: Any) -> None:
        """Let it end by itself, where it runs, and kill it in any case. `arguments` are for its own `stop`."""
        if self._restarting is not None:
            self._restarting.cancel()
        if self.actor is None:
            return
        runs, self.pulse = self.pulse is not None, None
        if kindly and runs:
            await settle(self.actor.stop.remote(*arguments), timeout_s)
        ray.kill(self.actor)


async def settle(ended: Awaitable[Any], timeout_s: float) -> None:
    """Wait for an actor to do what ends it; whether it does or not, it is killed afterwards."""
    with contextlib.suppress(ray.exceptions.RayError, asyncio.TimeoutError):
        await asyncio.wait_for(ended, timeout_s)
