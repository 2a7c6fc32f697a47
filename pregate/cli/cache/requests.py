"""Requests of a recording: arrivals and lengths of a trace, prompts and answers from texts."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pregate.base.errors import UserError

#: A trace's columns.
COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Request:
    """A prompt that arrives at a time, and the tokens that answer it."""

    arrival_s: float
    prompt: list[int]
    answer: list[int]


def read_trace(path: Path, num_requests: int) -> list[tuple[float, int, int]]:
    """Return the first requests of a .csv of `COLUMNS`; UserError where it is none."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [[float(row[name]) for name in COLUMNS] for row in islice(csv.DictReader(file), num_requests)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError.of("--trace", path, f"is not a .csv with columns {', '.join(COLUMNS)} ({error!r})") from error
    if not rows:
        raise UserError.of("--trace", path, "holds no request")
    return [(arrival, int(prompt), int(output)) for arrival, prompt, output in rows]


def make_requests(
    trace: Sequence[tuple[float, int, int]],
    texts: Sequence[str],
    tokenize: Callable[[str], list[int]],
    *,
    context: int,
    scale: float,
) -> list[Request]:
    """Give every arrival the next text. Lengths are the trace's times `scale`, cut to the context and to the text."""
    requests = []
    for number, (arrival_s, *lengths) in enumerate(trace):
        wanted, num_answer = (max(1, round(length * scale)) for length in lengths)
        wanted = min(wanted, context - 2)
        ids = tokenize(texts[number % len(texts)])[: min(wanted + num_answer, context - 1)]
        num_prompt = min(wanted, len(ids) - 1)
        if num_prompt > 0:
            requests.append(Request(arrival_s, ids[:num_prompt], ids[num_prompt:]))
    return requests
