"""JSON as its standard has it, no Infinity and no NaN, written; and read from files that anybody may have made."""

from __future__ import annotations

import json
import math
from typing import Any


def strict_json(value: Any) -> str:
    """Return `value` as one line of JSON, with null for a number that is not finite.

    Example: {"perplexity": inf, "layers": [1.5]} gives '{"perplexity": null, "layers": [1.5]}'.
    """
    return json.dumps(_finite(value), allow_nan=False)


def parse_json(text: str | bytes) -> Any:
    """What JSON says; ValueError for text that is none, and for such as is nested more deeply than Python reads."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
