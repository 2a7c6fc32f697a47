"""How numba's loops are compiled: when their module is imported, once per machine and user.

Importing numba takes 100 MB and most of a second: only what runs the loops imports their modules.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit

_log = logging.getLogger(__name__)
_IMPORTED = re.compile(r"^from (pregate\.[\w.]+) import", re.MULTILINE)

#: A product and a sum may be rounded once.
STRICT = frozenset({"contract"})
#: Sums may be added up in any order, so that loops over them become vector code. numba lets it hold for all that a
#: function is made of: not for one with `vectors.exp` in it. It is never said that no value is infinite or no number.
ANY_ORDER = STRICT | {"reassoc", "nsz"}


def compiled(signature: str, fastmath: frozenset[str] = STRICT) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function for exactly these types; without the interpreter's lock while it runs.

    The machine code is kept in a cache folder: NUMBA_CACHE_DIR, else beside the source, else the user's. Processes that
    compile at once each write a file of their own and rename it. Where no folder can be written, as in a read-only
    container without a home or on a full disk, every process compiles. numba looks at time and size of a function's own
    file to see whether its machine code is still good; the name says what is in that, and in what it imports of ours.
    """

    def compile_it(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__qualname__ += f"_{_digest(Path(inspect.getfile(function)))}"
        options: Any = {"fastmath": set(fastmath), "nogil": True, "error_model": "numpy", "boundscheck": False}
        try:
            return njit(signature, cache=True, **options)(function)
        except (RuntimeError, OSError) as error:  # no folder that can be written; it could not be written after all
            if isinstance(error, RuntimeError) and "no locator available" not in str(error):
                raise
            _log.warning("%s: its machine code is kept nowhere, every start compiles: %s", function.__name__, error)
            return njit(signature, **options)(function)

    return compile_it


def inlined(fastmath: frozenset[str] = STRICT) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function into those that call it."""
    return njit(fastmath=set(fastmath), error_model="numpy", boundscheck=False, forceinline=True)


@cache
def _digest(file: Path) -> str:
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources(file))).hexdigest()[:16]


def sources(file: Path) -> list[Path]:
    """Return `file` and all of ours that it imports, itself or through others: their loops may be compiled into its."""
    found, todo, root = set[Path](), [file], Path(__file__).parents[2]
    while todo:
        if (source := todo.pop()) not in found:
            found.add(source)
            todo += [root / f"{name.replace('.', '/')}.py" for name in _IMPORTED.findall(source.read_text())]
    return sorted(found)
