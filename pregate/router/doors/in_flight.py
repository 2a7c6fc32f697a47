"""`InFlight`: the requests that one front door has taken and not ended: how many, whose, and under which ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pregate.base.errors import QueueFullError, UserError


@dataclass(eq=False)
class Taken:
    """One request: the engine's ids of its completions, and whether it was aborted."""

    engine_ids: Sequence[str] = ()
    aborted: bool = False


class InFlight:
    """At most `max_requests`; `on_change` hears their number. Ids are the caller's: two may choose the same."""

    def __init__(self, max_requests: int, on_change: Callable[[int], None] = lambda num: None) -> None:
        self.num_requests = 0
        self._on_change = on_change
        self.idle = asyncio.Event()
        self.idle.set()
        self._max_requests = max_requests
        self._named: dict[tuple[str, str], Taken] = {}

    def find(self, caller: str, request_id: str) -> Taken | None:
        """The request of this id that runs for this caller."""
        return self._named.get((caller, request_id))

    @contextmanager
    def take(self, caller: str, request_id: str, num: int) -> Iterator[Taken]:
        """Count a request of `num` completions in while the block runs.

        QueueFullError at the bound, UserError for an id that runs and is not aborted.
        """
        name, taken = (caller, request_id), Taken()
        if name in self._named and not self._named[name].aborted:
            raise UserError.of("request_id", request_id, "is running already; use a new one")
        if self.num_requests + num > self._max_requests:
            raise QueueFullError(f"the server holds {self.num_requests} requests, as many as it may; try again later")
        self._named[name] = taken
        self.num_requests += num
        self._on_change(self.num_requests)
        self.idle.clear()
        try:
            yield taken
        finally:
            if self._named.get(name) is taken:
                del self._named[name]
            self.num_requests -= num
            self._on_change(self.num_requests)
            if not self.num_requests:
                self.idle.set()
