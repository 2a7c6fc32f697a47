"""Sizes as people write them, `16GB` or `500 MiB`, for options that are bytes."""

from __future__ import annotations

import re

from pydantic import BeforeValidator

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt]i?)b?|b)", re.IGNORECASE)
_EXPONENT = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
#: How they are written, for help and errors.
EXAMPLES = "16GB, 500MB or 16GiB"


def read_size(value: object) -> object:
    """The bytes of a size with a unit; anything else as it is, for the option's type to read.

    Examples: "1.5kB" -> 1500, "2KiB" -> 2048, "16G" -> 16 * 10**9.
    """
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        return value
    number, unit = found[1], (found[2] or "").lower()
    return round(float(number) * (1024 if unit.endswith("i") else 1000) ** _EXPONENT[unit[:1]])


def written(num_bytes: float) -> str:
    """Bytes as people write them, rounded down. Examples: 9e11 -> "900GB", 1_239_999_999 -> "1.23GB", 99 -> "99"."""
    for unit in "TGM":
        size = 1000 ** _EXPONENT[unit.lower()]
        if num_bytes >= size:
            return f"{int(num_bytes) * 100 // size / 100:g}{unit}B"
    return f"{num_bytes:g}"


#: Annotate an option with it that is, or can be, bytes.
SIZE = BeforeValidator(read_size)
