"""Memory in pages of 2 MB: a step reads all weights, and with pages of 4 KB much of that time goes to looking pages up.

Most in a virtual machine, where each look-up is two (docs/measurements.md).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

from pregate.base.log import get_logger

_log = get_logger(__name__)

HUGE_BYTES = 2 << 20
#: Linux 6.1's madvise(2): make huge pages of what is there, at once, whatever the machine's default is.
_MADV_COLLAPSE = 25


def collapse_later() -> None:
    """`collapse`, in a thread that ends with the process: copying takes seconds per GB, and memory serves meanwhile."""

    def work() -> None:
        _log.info("%d MB of memory laid in huge pages", collapse() >> 20)

    threading.Thread(target=work, name="huge pages", daemon=True).start()


def collapse() -> int:
    """Ask Linux to lay this process's anonymous memory in huge pages; returns the bytes it did so for.

    0 where the kernel is older or no Linux. Mapped files, and what is smaller than a huge page, stay as they are.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return 0
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    before = _huge_bytes()
    for start, stop in _anonymous():
        madvise(start, stop - start, _MADV_COLLAPSE)  # a page that cannot be is left, the others are done
    return max(0, _huge_bytes() - before)


def _anonymous() -> Iterator[tuple[int, int]]:
    """Addresses of writable memory behind no file, rounded inwards to huge pages."""
    for line in _lines("maps"):
        span, rights, _, _, inode, *name = line.split()
        if rights == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            start, stop = (int(part, 16) for part in span.split("-"))
            start, stop = -(-start // HUGE_BYTES) * HUGE_BYTES, stop // HUGE_BYTES * HUGE_BYTES
            if start < stop:
                yield start, stop


def _huge_bytes() -> int:
    return sum(int(line.split()[1]) << 10 for line in _lines("smaps_rollup") if line.startswith("AnonHugePages"))


def _lines(name: str) -> list[str]:
    try:
        return Path("/proc/self", name).read_text().splitlines()
    except OSError:
        return []
