"""Serves the path router: a compute thread that takes prompts and computes, beside the link's I/O thread."""

from __future__ import annotations

from threading import Event as StopEvent
from typing import Any

import zmq

from pregate.base.errors import PregateError, UnavailableError, UserError
from pregate.router.link.inbox import Pending
from pregate.router.link.link import EngineLink, LinkOptions
from pregate.router.link.messages import FailedEvent, RouteRequest
from pregate.router.paths.prompts import Prompts

#: Prompts of so many tokens are taken between two turns.
_TAKEN_TOKENS = 1 << 20


class PathServer:
    """Serves the paths of `prompts` on `endpoint`, as `EngineServer` does an engine; the endpoint is bound here."""

    def __init__(
        self,
        prompts: Prompts,
        endpoint: str,
        *,
        options: LinkOptions | None = None,
        idle_poll_s: float = 0.1,
        context: zmq.Context | None = None,
    ) -> None:
        self._prompts, self._idle_poll_s = prompts, idle_poll_s
        self._link = EngineLink(endpoint, prompts.info, options or LinkOptions(), context)

    @property
    def has_work(self) -> bool:
        """Whether a prompt waits."""
        return len(self._prompts) > 0 or len(self._link.inbox) > 0

    def status(self) -> dict[str, Any]:
        """Return what the compute thread is busy with, since when, and why requests are refused (or None)."""
        return {**self._link.activity.describe(), "unavailable": self._link.refusing}

    def run(self, stop_event: StopEvent) -> None:
        """Serve until `stop_event` is set; then every prompt still waiting fails with UNAVAILABLE."""
        error = PregateError("internal error in the path service")
        self._link.start()
        try:
            while not stop_event.is_set():
                self._turn()
            error = UnavailableError("the path service is stopping")
        finally:
            self._link.stop(error)

    def _turn(self) -> None:
        if not len(self._prompts):
            self._link.inbox.wait(self._idle_poll_s)
        cancels, taken = self._link.inbox.take(_TAKEN_TOKENS)
        for request_id in cancels:
            self._prompts.cancel(request_id)
        self._link.publish([event for pending in taken for event in self._begin(pending)])
        if len(self._prompts):
            with self._link.activity.doing(f"the paths of {len(self._prompts)} prompts"):
                answers = self._prompts.turn()
            self._link.publish(answers)

    def _begin(self, pending: Pending) -> list[FailedEvent]:
        request = pending.request
        try:
            if not isinstance(request, RouteRequest):
                raise UserError("the path service computes paths and generates nothing")
            self._prompts.add(request, pending.arrived_s)
        except PregateError as error:
            return [FailedEvent(request.request_id, error.code, str(error))]
        return []
