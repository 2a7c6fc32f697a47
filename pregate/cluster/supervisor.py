"""The one named, detached actor that owns a deployment: leases in, life and death of everything else out.

It is an async actor that never blocks: launchers renew while hosts load. When a part is lost for good the deployment
has failed: what is left is stopped, and launchers hear why. When the last lease is released or lapses it drains, stops
what it owns, and then itself. Should its process die, Ray makes another, which adopts what runs, by the record; what
it owns ends by itself should the actor be dead for good.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pregate.base import log
from pregate.base.errors import PregateError, UnavailableError, UserError
from pregate.cluster import run_folder
from pregate.cluster.config import ServeConfig
from pregate.cluster.leases import Leases
from pregate.cluster.owned import Children
from pregate.cluster.record import Record

CHECK_EVERY_S = 1.0
#: Holds a new supervisor until its creator's first call; who dies or is refused before it leaves nothing behind.
CREATOR = "creator"
#: Between the end of clean-up and our own death: replies on their way get out.
LAST_WORD_S = 0.3
#: What happened lately, for launchers that print it.
MAX_NOTES = 50

logger = log.get_logger(__name__)


@dataclass(frozen=True)
class Failure:
    """An error as it crosses Ray: its gRPC status name (base/errors.py, BY_CODE) and its sentence."""

    code: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        cause = getattr(error, "cause", None) or error  # RayTaskError keeps the original there
        if isinstance(cause, PregateError):
            return cls(cause.code, cause.for_command_line)
        return cls(PregateError.code, f"{type(cause).__name__}: {cause}".splitlines()[0])


#: From how it is to be, the folder for its sockets, and what to call when there is something to save.
MakeChildren = Callable[[ServeConfig, Path, Callable[[], None]], Children]


class Supervisor:
    """One deployment's owner. States: new, starting, ready, failed, stopping. `key` is the actor's, whichever process
    it runs in."""

    def __init__(self, name: str, make_children: MakeChildren, key: str) -> None:
        log.configure(f"supervisor {name}")
        self._name = name
        self._make_children = make_children
        self._leases = Leases()
        self._state = "new"
        self._config: ServeConfig | None = None
        self._children: Children | None = None
        self._info: dict[str, Any] | None = None
        self._failure: Failure | None = None
        self._notes: list[tuple[int, str]] = []  # numbered, so that none is printed twice
        self._leaving: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._start_task: asyncio.Task[None] | None = None
        self._record = Record(key)
        run_folder.mark(name)
        saved = self._record.load()
        if saved is None:
            self._leases.take(CREATOR, time.monotonic())
        else:
            self._take_over(saved)
        self._spawn(self._watch())  # Ray constructs async actors on their event loop

    # ---- what launchers call ----

    async def launch(self, launcher_id: str, config_values: dict[str, Any]) -> dict[str, Any]:
        """Take a lease and start the deployment, or join the one that runs; returns `status` at once.

        Repeating it is harmless. A config that differs from the running one comes back as a failure that names the
        option; then no lease is held.
        """
        if self._state in ("stopping", "failed"):
            return self._refusal(UnavailableError(f"deployment {self._name!r} is {self._state}; try again"))
        try:
            config = ServeConfig.from_dict(config_values)
            if self._config is not None:
                config.check_joins(self._config)
        except UserError as error:
            return self._refusal(error)
        self._leases.take(launcher_id, time.monotonic())
        self._leases.release(CREATOR)
        if self._config is None:
            self._config, self._state = config, "starting"
            log.configure(f"supervisor {self._name}", config.log_format)
            self._children = self._make_children(config, self._record.folder, self._save)
            self._start_task = self._spawn(self._start(self._children))
        self._save()
        return await self.status()

    async def renew(self, launcher_id: str) -> dict[str, Any]:
        """Renew a lease; `status`, with `leased` false when the lease is gone."""
        leased = self._leases.renew(launcher_id, time.monotonic())
        return {**await self.status(), "leased": leased}

    async def release(self, launcher_id: str) -> None:
        """Give a lease back; the launcher's doors are drained, and with the last lease everything goes."""
        if self._leases.release(launcher_id):
            self._let_go([launcher_id])

    async def holds(self, launcher_id: str) -> bool:
        """Whether anything of a launcher is still here: its lease, its doors, or all of it while we stop."""
        return self._state == "stopping" or launcher_id in self._leaving or launcher_id in self._leases.holders

    async def add_door(self, launcher_id: str, options: dict[str, Any]) -> dict[str, Any]:
        """Start a front door that lives as long as the launcher's lease. Returns {"host", "port"} or {"failure"}."""
        if self._state != "ready" or self._children is None or launcher_id not in self._leases.holders:
            return self._refusal(UnavailableError(f"deployment {self._name!r} is {self._state}"))
        task = asyncio.ensure_future(self._children.add_door(launcher_id, options))
        await asyncio.wait([task])
        error = task.exception()
        self._save()
        return self._refusal(error) if error is not None else task.result()

    async def scale(self, hosts: int) -> dict[str, Any]:
        """Have so many hosts. Returns {"hosts"}, how many there are, once that is reached; with "superseded_by" once
        another call asked for another number; or {"failure"}."""
        if self._state != "ready" or self._children is None:
            return self._refusal(UnavailableError(f"deployment {self._name!r} is {self._state}"))
        try:
            return await self._children.scale(hosts)
        except Exception as error:  # noqa: BLE001 - it crosses Ray as what it says
            return self._refusal(error)

    async def status(self) -> dict[str, Any]:
        """State, stage of the start, the failure if any, what happened lately, and what `Children.start` returned."""
        return {
            "state": self._state,
            "stage": self._children.stage if self._children is not None else "",
            "failure": None if self._failure is None else vars(self._failure),
            "notes": list(self._notes),
            "launchers": list(self._leases.holders),
            "info": self._info,
            "leased": True,
        }

    # ---- from one process to the next ----

    def _save(self) -> None:
        """Keep what whoever takes our place needs to know."""
        if self._config is None:
            return
        running = self._children if self._state == "ready" else None
        self._record.save(
            {
                "config": self._config.to_dict(),
                "state": self._state,
                "failure": self._failure,
                "notes": self._notes,
                "launchers": [*self._leases.holders, *self._leaving],  # who leaves has doors yet
                "children": running and running.saved(),
            }
        )

    def _take_over(self, saved: dict[str, Any]) -> None:
        """Go on where a supervisor that died has left it. What had not started, or was stopping, is ended."""
        self._state, self._failure, self._notes = saved["state"], saved["failure"], saved["notes"]
        self._config = config = ServeConfig.from_dict(saved["config"])
        log.configure(f"supervisor {self._name}", config.log_format)
        for launcher in saved["launchers"]:
            self._leases.take(launcher, time.monotonic())
        self._children = children = self._make_children(config, self._record.folder, self._save)
        if self._state == "ready":
            self._info = children.adopt(saved["children"])
            self._note("the supervisor's process died; another one goes on")
        elif self._state == "starting":
            self._fail(Failure(UnavailableError.code, "the supervisor died during the start"))
        else:
            self._spawn(self._stop() if self._state == "stopping" else children.stop(grace_s=0))

    # ---- what runs by itself ----

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_end)
        return task

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("supervisor task failed", exc_info=error)

    async def _start(self, children: Children) -> None:
        start = asyncio.ensure_future(children.start())
        try:
            await asyncio.wait([start])
        except asyncio.CancelledError:
            start.cancel()
            await asyncio.wait([start])
            raise
        error = start.exception()
        if error is None:
            self._info, self._state = start.result(), "ready"
            self._save()
            logger.info("the deployment is ready")
            return
        logger.error("the deployment did not start", exc_info=error)
        self._failure, self._state = Failure.of(error), "failed"
        self._save()
        await children.stop(grace_s=0)

    async def _watch(self) -> None:
        """Every second: drop lapsed leases, see who died. Ends with the deployment, and fails it should a look fail."""
        while self._state != "stopping":
            try:
                await self._look()
            except Exception as error:  # a bug of ours, which launchers and the logs are to tell
                logger.error("the deployment could not be looked after", exc_info=error)
                self._fail(Failure.of(error))
            await asyncio.sleep(CHECK_EVERY_S)

    async def _look(self) -> None:
        lapsed = self._leases.lapse(time.monotonic())
        for launcher in lapsed:
            logger.warning("the lease of launcher %s lapsed", launcher)
        self._let_go(lapsed)
        if self._state != "ready" or self._children is None:
            return
        self._save()
        health = await self._children.check()
        for note in health.notes:
            self._note(note)
        if health.lost and self._state == "ready":
            sentence = "; ".join(f"{part} is lost: {reason}" for part, reason in health.lost.items())
            logger.error("%s", sentence)
            self._fail(Failure(UnavailableError.code, sentence))

    def _note(self, note: str) -> None:
        logger.warning("%s", note)
        self._notes = [*self._notes, (self._notes[-1][0] + 1 if self._notes else 0, note)][-MAX_NOTES:]
        self._save()

    def _fail(self, failure: Failure) -> None:
        """Fail for good; what is left drains and stops, so that running requests hear of it."""
        if self._state not in ("starting", "ready") or self._children is None or self._config is None:
            return
        if self._start_task is not None:
            self._start_task.cancel()
        self._failure, self._state = failure, "failed"
        self._save()
        self._spawn(self._children.stop(self._config.drain_s))

    def _let_go(self, launchers: list[str]) -> None:
        """Drain the doors of launchers that are gone; after the last launcher, everything."""
        if self._state == "stopping":
            return
        if not self._leases:
            self._spawn(self._stop())
            self._state = "stopping"
            self._save()
            return
        if self._children is None or self._config is None:
            return
        for launcher in launchers:
            self._leaving.add(launcher)
            self._spawn(self._drop_doors(self._children, launcher, self._config.drain_s))

    async def _drop_doors(self, children: Children, launcher: str, drain_s: float) -> None:
        try:
            await children.drop_doors(launcher, drain_s)
        finally:
            self._leaving.discard(launcher)

    async def _stop(self) -> None:
        import ray

        if self._start_task is not None and not self._start_task.done():
            self._start_task.cancel()
            await asyncio.wait([self._start_task])
        try:
            if self._children is not None and self._config is not None:
                await self._children.stop(self._config.drain_s)
            await asyncio.sleep(LAST_WORD_S)
            if self._failure is None:
                run_folder.unmark(self._name)
        finally:
            self._record.remove()
            ray.kill(ray.get_runtime_context().current_actor)

    def _refusal(self, error: BaseException) -> dict[str, Any]:
        return {"state": "refused", "failure": vars(Failure.of(error))}
