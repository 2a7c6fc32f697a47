"""Memory that was laid in pages of 4 KB is in pages of 2 MB afterwards, with what it held."""

import subprocess
import sys

import pytest

SCRIPT = """
import mmap
from pregate.base.huge_pages import HUGE_BYTES, collapse
held = mmap.mmap(-1, 16 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held.madvise(mmap.MADV_NOHUGEPAGE)  # also where the machine's default is huge pages
for start in range(0, len(held), mmap.PAGESIZE):
    held[start : start + 4] = start.to_bytes(4, "little")
held.madvise(mmap.MADV_HUGEPAGE)
gained = collapse()
kept = all(int.from_bytes(held[s : s + 4], "little") == s for s in range(0, len(held), mmap.PAGESIZE))
print(gained // HUGE_BYTES, kept)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
def test_memory_is_laid_in_huge_pages_and_holds_what_it_held():
    out = subprocess.run([sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True, timeout=100)
    assert out.returncode == 0, out.stderr
    gained, kept = out.stdout.split()
    assert kept == "True"  # how many of the 16 depends on what memory is free in one piece
    if int(gained) == 0:
        pytest.skip("this kernel makes no huge pages on request (Linux 6.1 and CONFIG_TRANSPARENT_HUGEPAGE do)")
