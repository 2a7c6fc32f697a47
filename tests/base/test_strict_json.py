from __future__ import annotations

import json
import math

import pytest

from pregate.base.strict_json import parse_json, strict_json


def test_numbers_that_json_has_no_name_for_are_null():
    value = {"perplexity": math.inf, "layers": (1.5, [-math.inf, math.nan]), "text": "inf", "count": 3, "on": True}
    text = strict_json(value)
    assert json.loads(text, parse_constant=str.upper) == {
        "perplexity": None,
        "layers": [1.5, [None, None]],
        "text": "inf",
        "count": 3,
        "on": True,
    }


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, b"[" * 100_000])
def test_what_is_nested_too_deeply_is_no_json(text):
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(text)
