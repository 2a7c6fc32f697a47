"""Serves the path router: a compute thread that takes prompts and computes, beside the link's I/O thread."""

from __future__ import annotations

from collections.abc import Sequence

from pregate.base.errors import UserError
from pregate.router.link.link import EngineLink, LinkOptions
from pregate.router.link.messages import Event, RouteReply, RouteRequest, SubmitRequest
from pregate.router.link.server import IDLE_POLL_S, LoopServer
from pregate.router.paths.prompts import Prompts

#: Prompts of so many tokens are taken between two turns.
_TAKEN_TOKENS = 1 << 20


class PathServer(LoopServer):
    """Serves the paths of `prompts` on `endpoint`, as `EngineServer` does an engine; the endpoint is bound here."""

    name = "path service"

    def __init__(self, prompts: Prompts, endpoint: str) -> None:
        super().__init__(EngineLink(endpoint, prompts.info, LinkOptions(), None, self.name))
        self._prompts = prompts

    @property
    def has_work(self) -> bool:
        """Whether a prompt waits."""
        return len(self._prompts) > 0 or len(self._link.inbox) > 0

    def _turn(self) -> None:
        if not len(self._prompts):
            self._link.inbox.wait(IDLE_POLL_S)
        cancels, taken = self._link.inbox.take(_TAKEN_TOKENS)
        for request_id in cancels:
            self._prompts.cancel(request_id)
        self._link.publish([event for pending in taken for event in self._begin(pending)])
        if len(self._prompts):
            with self._link.activity.doing(f"the paths of {len(self._prompts)} prompts"):
                answers = self._prompts.turn()
            self._link.publish(answers)

    def _take(self, request: SubmitRequest | RouteRequest, arrived_s: float) -> Sequence[Event | RouteReply]:
        if not isinstance(request, RouteRequest):
            raise UserError("the path service computes paths and generates nothing")
        self._prompts.add(request, arrived_s)
        return ()
