"""Is an actor alive? Each is asked for its status again and again; one slow to answer hides no other's death."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray.exceptions

#: An actor that has given no answer for this long is said to be silent; it may be busy, or stopped.
SILENT_AFTER_S = 2.0
#: How long one look waits for the answers; what comes later is read by the next look.
LOOK_S = 0.5
#: So often in a row Ray may call an actor unavailable, with a pause of `LOOK_S` each time, before it is lost: Ray
#: gives a node up after 15 s, and one of ours that gives no answer is given up after 30.
MOST_UNAVAILABLE = 50
#: How Ray's error of an actor that is dead says that its node is.
_NODE_DIED = "node has died"


class Pulse:
    """One actor's. `lost` says why it is dead for good, `silent_s` for how long it has not answered."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._question: asyncio.Task[str] | None = None
        self._asked_s = 0.0
        self._silent = False
        self.lost = ""
        #: What it last said of itself.
        self.status: Mapping[str, Any] = {}

    @property
    def silent_s(self) -> float:
        return 0.0 if self._question is None else time.monotonic() - self._asked_s

    def news(self) -> str:
        """What has changed since this was last called: that it is silent now, or answers again; else ""."""
        silent = self.silent_s > SILENT_AFTER_S
        changed, self._silent = silent != self._silent, silent
        if not changed or self.lost:
            return ""
        return f"no answer for {self.silent_s:.0f} s" if silent else "answers again"

    def ask(self) -> asyncio.Task[str]:
        """Ask, unless an answer is still awaited; the task is done when `take` has something to read."""
        if self._question is None:
            self._question, self._asked_s = asyncio.ensure_future(self._answer()), time.monotonic()
        return self._question

    def take(self) -> None:
        """Read the answer, where there is one."""
        if self._question is not None and self._question.done():
            question, self._question = self._question, None
            if not question.cancelled():  # else it is asked again
                error = question.exception()
                self.lost = (
                    question.result() if error is None else f"it gave no status ({type(error).__name__}: {error})"
                )

    async def _answer(self) -> str:
        for _ in range(MOST_UNAVAILABLE):
            try:
                self.status = await self._actor.status.remote()
            except ray.exceptions.ActorUnavailableError:  # it may come back; its death is another error
                await asyncio.sleep(LOOK_S)
                continue
            except ray.exceptions.RayTaskError as error:
                return str(error.cause)
            except ray.exceptions.RayError as error:
                what = "its node was lost" if _NODE_DIED in str(error) else "its process died"
                return f"{what} ({type(error).__name__})"
            return "" if self.status.get("running", True) else "its loop has ended"
        return "Ray cannot reach it"


async def look(pulses: Iterable[Pulse]) -> None:
    """Ask every actor and read what answers have come within `LOOK_S`."""
    pulses = list(pulses)
    if pulses:
        await asyncio.wait([pulse.ask() for pulse in pulses], timeout=LOOK_S)
    for pulse in pulses:
        pulse.take()
