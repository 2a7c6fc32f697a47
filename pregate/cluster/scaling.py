"""How many hosts there are, and who serves what, while they serve: whoever asked last has it, and units move a few at a
time."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import ray.exceptions

from pregate.base.errors import PregateError, UnavailableError
from pregate.base.log import get_logger
from pregate.cluster import run_folder
from pregate.cluster.config import ServeConfig
from pregate.cluster.host_load import HostLoad
from pregate.cluster.hosts import Hosts
from pregate.cluster.placement import Placement, check, check_request
from pregate.cluster.rebalance import moved, moves, slowest_load
from pregate.cluster.routed_experts import RoutedExperts
from pregate.cluster.unit_load import UnitLoad

#: So many units are loaded at a time for each host that there is to be.
UNITS_AT_A_TIME = 8
#: How often Ray is asked what nodes it is to take away. A spot machine stays half a minute or two after its notice.
DRAINING_EVERY_S = 2.0
#: How long to wait for a part that is being started again, before looking once more.
AGAIN_S = 0.2

logger = get_logger(__name__)


class Scaling:
    """One task at a time changes anything: towards the number of hosts that was asked for last, or, where placement is
    balanced, towards what use asks for. `tell` calls every engine, as for `Hosts`."""

    def __init__(
        self, hosts: Hosts, experts: RoutedExperts, config: ServeConfig, tell: Callable[..., Awaitable[list[Any]]]
    ) -> None:
        self._hosts, self._experts, self._config, self._tell = hosts, experts, config, tell
        self._wanted = config.hosts
        self._answer: asyncio.Future[dict[str, Any]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._load = UnitLoad(sum(experts.num_routed))
        self._looked_s = self._asked_ray_s = time.monotonic()
        self._notes: list[str] = []
        self._host_load: HostLoad | None = None
        self._asking: asyncio.Task[None] | None = None  # for ourselves
        if config.max_hosts is not None:
            self._host_load = HostLoad(config.min_hosts, config.max_hosts, config.host_load)

    async def to(self, num_hosts: int) -> dict[str, Any]:
        """Have so many hosts; returns {"hosts"}, how many there are, when that is reached. What others ask for later
        supersedes it: then {"hosts", "superseded_by"} at once, the number they asked for. UserError for a number that
        the model's experts cannot be placed on; else what kept it from being reached."""
        config = self._config
        check_request(self._experts.num_routed, num_hosts, config.placement, config.replicas)
        config.check_hosts(num_hosts)
        if self._answer is None or self._answer.done() or num_hosts != self._wanted:
            if self._answer is not None and not self._answer.done():
                self._answer.set_result({"hosts": len(self._hosts.parts), "superseded_by": num_hosts})
            self._wanted, self._answer = num_hosts, asyncio.get_running_loop().create_future()
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._run(self._rebalance))
        return await asyncio.shield(self._answer)

    def look(self) -> list[str]:
        """Begin what use asks for, or Ray, where it is time and nothing is under way. Returns what was done, for
        people."""
        notes, self._notes = self._notes, []
        if self._host_load is not None:
            said = [part.pulse.status if part.pulse else {} for part in self._hosts.parts]
            known = [(str(status["pid"]), status["compute_s"]) for status in said if status]
            wanted = self._host_load.want(known if len(known) == len(said) else [], time.monotonic())
            if wanted is not None and not self._is_asked():
                notes.append(f"hosts compute for {self._host_load.busy:.0%} of the time: {wanted} are wanted")
                self._asking = asyncio.ensure_future(self._ask(wanted))
        if self._task is not None and not self._task.done():
            return notes
        now_s, every_s = time.monotonic(), self._config.rebalance_s if self._config.placement == "balanced" else 0.0
        if every_s and now_s - self._looked_s > every_s:
            self._looked_s = now_s
            self._task = asyncio.ensure_future(self._run(self._rebalance))
        elif now_s - self._asked_ray_s > DRAINING_EVERY_S and run_folder.own() is None:  # ours is of one node
            self._asked_ray_s = now_s
            self._task = asyncio.ensure_future(self._run(self._leave_draining_nodes))
        return notes

    async def _ask(self, num_hosts: int) -> None:
        try:
            await self.to(num_hosts)
        except PregateError as error:
            self._notes.append(f"there are still {len(self._hosts.parts)} hosts: {error}")

    async def stop(self) -> None:
        """Leave everything as it is; who waits hears of it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(UnavailableError("the deployment is stopping"))

    async def _run(self, first: Callable[[], Awaitable[None]]) -> None:
        await first()
        while self._answer is not None and not self._answer.done():
            answer, wanted, before = self._answer, self._wanted, len(self._hosts.parts)
            try:
                await self._reach(wanted, answer.done)
            except Exception as error:
                logger.error("%d hosts were not reached", wanted, exc_info=error)
                if not answer.done():
                    answer.set_exception(_failure(f"{wanted} hosts", error))
                continue
            if not answer.done():
                self._notes.append(f"scaled from {before} to {wanted} hosts")
                answer.set_result({"hosts": wanted})

    async def _reach(self, num_hosts: int, superseded: Callable[[], bool]) -> None:
        """Have `num_hosts` hosts that serve as their placement says; ends early once `superseded`."""
        await self._hosts.reserve(num_hosts)
        target = await self._target(num_hosts)
        if num_hosts > len(self._hosts.parts):
            await self._hosts.add(target)
        if await self._follow(target, -math.inf, superseded):
            await self._hosts.leave(num_hosts)

    async def _leave_draining_nodes(self) -> None:
        """Move hosts off nodes that Ray is to take away, all at once: there may be little time."""
        try:
            hosts = await asyncio.to_thread(self._hosts.on_draining_nodes)
        except ray.exceptions.RayError as error:
            logger.warning("Ray does not say which nodes it is to take away: %s", error)
            return
        moved = await asyncio.gather(*map(self._hosts.move_elsewhere, hosts), return_exceptions=True)
        for host, error in zip(hosts, moved, strict=True):
            if isinstance(error, Exception):
                reason = _failure(f"host {host}", error)
                self._notes.append(f"host {host} is still on a node that Ray is to take away: {reason}")
            else:
                self._notes.append(f"host {host} was moved: Ray is to take its node away")

    async def _rebalance(self) -> None:
        if self._config.placement == "balanced":
            try:
                self._load.take(np.sum(await self._tell("unit_rows"), axis=0))
                await self._follow_use()
            except (ray.exceptions.RayError, asyncio.TimeoutError, UnavailableError) as error:
                logger.warning("units were not moved to where use asks for them: %s", error)

    async def _follow_use(self) -> None:
        """Move units while that makes the slowest hosts faster by enough to be worth it."""
        load_LR, now = self._load.load_LR, self._hosts.placement
        if load_LR is None or now is None:
            return
        number, before = now.version, slowest_load(now, load_LR).sum()
        await self._follow(await self._target(now.num_hosts), 0.05, self._is_asked)
        after = self._hosts.placement
        if after is not None and after.version > number:
            gain = 1 - slowest_load(after, load_LR).sum() / before
            self._notes.append(f"units were moved to where use asks for them: slowest hosts have {gain:.0%} less to do")

    def _is_asked(self) -> bool:
        return self._answer is not None and not self._answer.done()

    async def _target(self, num_hosts: int) -> Placement:
        nodes = await asyncio.to_thread(self._hosts.nodes, num_hosts)
        target = self._experts.placement(self._config, num_hosts, self._load.load_LR, nodes)
        check(target, self._experts.num_routed, self._experts.one_index)
        return target

    async def _follow(self, target: Placement, least_gain: float, enough: Callable[[], bool]) -> bool:
        """Move a few units at a time until all serve as `target` says, or more would gain less than `least_gain`. False
        when it was `enough` before. UnavailableError when nothing could be moved for as long as a start may take."""
        hosts, give_up_s = self._hosts, time.monotonic() + self._config.start_timeout_s
        while not enough():
            assert hosts.placement is not None, "hosts are placed when they start"
            some = await asyncio.to_thread(self._next, hosts.placement, target, least_gain)
            if some is None:
                return True
            try:
                if await self._serve(target.num_hosts):
                    await hosts.move(some)
                    give_up_s = time.monotonic() + self._config.start_timeout_s
                    continue
            except (ray.exceptions.RayError, asyncio.TimeoutError, UnavailableError) as error:
                logger.warning("units could not be moved, and will be again: %s", f"{type(error).__name__}: {error}")
            if time.monotonic() > give_up_s:
                raise UnavailableError(f"units could not be moved for {self._config.start_timeout_s:.0f} s")
            await asyncio.sleep(AGAIN_S)
        return False

    def _next(self, now: Placement, target: Placement, least_gain: float) -> Placement | None:
        """The placement after the next few moves; None where there are none."""
        width = max(now.num_hosts, target.num_hosts)
        now, target = replace(now, num_hosts=width), replace(target, num_hosts=width)
        known = [load for load in (self._load.load_LR, self._experts.load_LR) if load is not None]
        load_LR = known[0] if known else np.ones(target.copies.shape[:2])
        some = moves(now, target, UNITS_AT_A_TIME * len(self._hosts.parts), load_LR, least_gain)
        return moved(now, some) if some else None

    async def _serve(self, num_hosts: int) -> bool:
        """Whether the first `num_hosts` hosts run, and serve every engine."""
        if not all(part.pulse for part in self._hosts.parts[:num_hosts]):
            return False
        for lost in await self._tell("lost_hosts"):
            for host in range(len(lost), num_hosts):
                await self._hosts.tell_of(host)
            if len(lost) < num_hosts or any(lost[:num_hosts]):
                return False
        return True


def _failure(what: str, error: Exception) -> PregateError:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, PregateError):
        return cause
    if isinstance(cause, asyncio.TimeoutError):
        return UnavailableError(f"{what}: a host did not start in time")
    return UnavailableError(f"{what}: {type(cause).__name__}: {cause}".splitlines()[0])
