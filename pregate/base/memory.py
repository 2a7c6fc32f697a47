"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes


def give_back_heap() -> None:
    """Have glibc return what lies free on its heap; nothing where the C library has no such call.

    Tensors of a few MB are cut from the heap, which stays as large as it once was: the peak of one stage of the work
    would add to that of the next.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
