"""JSON as its standard has it: no Infinity, no NaN."""

from __future__ import annotations

import json
import math
from typing import Any


def strict_json(value: Any) -> str:
    """Return `value` as one line of JSON, with null for a number that is not finite.

    Example: {"perplexity": inf, "layers": [1.5]} gives '{"perplexity": null, "layers": [1.5]}'.
    """
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
