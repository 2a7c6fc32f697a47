"""Memory: giving it back, what is left, and what fails for lack of it."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pregate.base.errors import PregateError

#: How torch says on the CPU that there is no memory, with an error of no kind of its own.
_NO_MEMORY = "can't allocate memory"


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


@contextmanager
def out_of_memory_fails(of: str = "") -> Iterator[None]:
    """PregateError where the block finds no memory, torch's, NumPy's or the system's (`of`: for what); any other error
    is a defect."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not _lacks_memory(error):
            raise
        raise PregateError(f"out of memory{of and ' ' + of}: {error}") from error


def _lacks_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # By name: torch's own class is not imported here.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in str(error)
