"""Requests on their way from the link's I/O thread to the compute thread: bounded in number and in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from pregate.base.errors import QueueFullError
from pregate.router.link.messages import RouteRequest, SubmitRequest


@dataclass(frozen=True)
class Pending:
    """A request that waits to be taken, and when it came (monotonic)."""

    request: SubmitRequest | RouteRequest
    arrived_s: float


class Inbox:
    """Two threads share one: the I/O thread puts and cancels, the compute thread takes.

    Cancels need no bound of their own: there is at most one for each request that was taken.
    """

    def __init__(self, max_requests: int, max_bytes: int, name: str = "engine") -> None:
        self._max_requests, self._max_bytes, self._name = max_requests, max_bytes, name
        self._pending: OrderedDict[str, Pending] = OrderedDict()
        self._cancels: list[str] = []
        self._num_bytes = 0
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._pending)

    def put(self, pending: Pending) -> None:
        """Queue a request, one in any case. Raises QueueFullError at either bound."""
        with self._changed:
            full = 0 < self._num_bytes > self._max_bytes - pending.request.num_bytes
            if full or len(self._pending) >= self._max_requests:
                held = f"{len(self._pending)} requests of {self._num_bytes} bytes"
                raise QueueFullError(f"{held} wait for the {self._name}, as many as may; try again later")
            self._pending[pending.request.request_id] = pending
            self._num_bytes += pending.request.num_bytes
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """Take a request out again, or let the compute thread know when it has been taken."""
        with self._changed:
            pending = self._pending.pop(request_id, None)
            if pending is None:
                self._cancels.append(request_id)
            else:
                self._num_bytes -= pending.request.num_bytes
            self._changed.notify()

    def take(self, max_tokens: int) -> tuple[list[str], list[Pending]]:
        """Take all cancels, and the oldest requests of together at most `max_tokens` (one of them in any case)."""
        with self._changed:
            cancels, self._cancels = self._cancels, []
            taken: list[Pending] = []
            while self._pending:
                oldest = next(iter(self._pending.values()))
                max_tokens -= len(oldest.request.token_ids)
                if taken and max_tokens < 0:
                    break
                taken.append(self._pending.popitem(last=False)[1])
                self._num_bytes -= oldest.request.num_bytes
            return cancels, taken

    def wait(self, timeout_s: float) -> None:
        """Sleep until there is something to take, at most `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._cancels, timeout_s)
