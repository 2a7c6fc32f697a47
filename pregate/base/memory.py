"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
from pathlib import Path


def give_back_heap() -> None:
    """Have glibc return what lies free on its heap; nothing where the C library has no such call.

    Tensors of a few MB are cut from the heap, which stays as large as it once was: the peak of one stage of the work
    would add to that of the next.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_bytes() -> int:
    """Memory that can still be had: the machine's, or what the container's limit leaves."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))
