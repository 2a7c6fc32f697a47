"""`telling`: a stage of the start that takes long is said again and again, with its seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: A stage of the start that lasts is said again this often.
TELL_EVERY_S = 10.0


@contextmanager
def telling(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Say `what` now, and while the block lasts every `TELL_EVERY_S` once more."""
    started_s, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(TELL_EVERY_S):
            say(f"{what} (after {time.monotonic() - started_s:.0f} s)")

    say(what)
    teller = threading.Thread(target=tell, name="pregate-telling", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
