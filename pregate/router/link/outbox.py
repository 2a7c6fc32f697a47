"""Events on their way from the compute thread to the link's I/O thread: bounded, with a pipe that wakes its poll."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator, Sequence
from contextlib import suppress

from pregate.base.errors import PregateError
from pregate.router.link.messages import Event, RouteReply

#: How long the compute thread waits for room.
_PATIENCE_S = 10.0


class Outbox:
    """Two threads share one: the compute thread puts and wakes, the I/O thread polls `awake`, rests and takes."""

    def __init__(self, max_steps: int) -> None:
        self._steps: queue.Queue[Sequence[Event | RouteReply]] = queue.Queue(max_steps)
        self.awake, self._wake = os.pipe()
        os.set_blocking(self.awake, False)
        os.set_blocking(self._wake, False)

    def put(self, events: Sequence[Event | RouteReply]) -> None:
        """Queue what one step brought. Raises PregateError when the I/O thread is stuck."""
        try:
            self._steps.put(events, timeout=_PATIENCE_S)
        except queue.Full as error:
            raise PregateError(f"the link to the front doors took no events for {_PATIENCE_S:.0f} s") from error
        self.wake_up()

    def wake_up(self) -> None:
        # A full pipe wakes, too; one that nobody reads is that of an I/O thread that has ended.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._wake, b"\0")

    def close(self) -> None:
        """Nobody is woken any more."""
        os.close(self._wake)

    # ---- the I/O thread ----

    def rest(self) -> None:
        """Sleep again after `awake` was there to be read."""
        os.read(self.awake, 4096)

    def take(self) -> Iterator[Sequence[Event | RouteReply]]:
        """What each step brought, in order, until there is no more now."""
        with suppress(queue.Empty):
            while True:
                yield self._steps.get_nowait()

    def leave(self) -> None:
        """Read no more."""
        os.close(self.awake)
