"""`stage`: one of the start that takes long is said again and again, with its seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: A stage of the start that lasts is said again this often.
SAY_EVERY_S = 5.0


@contextmanager
def stage(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Say `what` now, and while the block lasts every `SAY_EVERY_S` once more."""
    started_s, over = time.monotonic(), threading.Event()

    def say_again() -> None:
        while not over.wait(SAY_EVERY_S):
            say(f"{what} (after {time.monotonic() - started_s:.0f} s)")

    say(what)
    speaker = threading.Thread(target=say_again, name="pregate-stage", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()
