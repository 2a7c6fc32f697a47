"""Which cores of the machine a thread may use."""

from __future__ import annotations

import os


def pin(first: int, number: int) -> None:
    """Hold this thread, and the threads it starts, to `number` cores of those it may use, from the `first` on, round
    and round. Does nothing where the system cannot."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[(first + n) % len(cores)] for n in range(number)})
