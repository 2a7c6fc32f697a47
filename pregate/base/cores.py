"""Which cores of the machine a thread may use."""

from __future__ import annotations

import os


def pin(first_core: int, num_cores: int) -> None:
    """Hold this thread, and the threads it starts, to `num_cores` cores of those it may use, from `first_core` on,
    round and round. Does nothing where the system cannot."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[(first_core + n) % len(cores)] for n in range(num_cores)})
