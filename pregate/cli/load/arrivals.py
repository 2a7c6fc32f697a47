"""When requests come and how long they are: of a trace, or at random. Pure."""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pregate.base.errors import UserError

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Arrival:
    """A request that comes `arrival_s` after the load begins."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path, speed: float = 1.0, option: str = "--trace") -> list[Arrival]:
    """The arrivals of a CSV file, in order, the first at 0; `speed` times as fast. UserError for what is no trace."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames is None or not set(COLUMNS) <= set(rows.fieldnames):
            raise UserError.of(option, path, f"its first line must name the columns {', '.join(COLUMNS)}")
        found = []
        for row in rows:
            try:
                values = float(row[COLUMNS[0]]), int(row[COLUMNS[1]]), int(row[COLUMNS[2]])
            except (TypeError, ValueError):
                raise UserError.of(option, f"{path}:{rows.line_num}", "must be a time and two counts") from None
            if not 0 <= values[0] < float("inf") or min(values[1:]) < 0:
                raise UserError.of(option, f"{path}:{rows.line_num}", "must be 0 or more, each")
            found.append(Arrival(values[0], max(1, values[1]), max(1, values[2])))
    if not found:
        raise UserError.of(option, path, "has no arrivals")
    found.sort(key=lambda arrival: arrival.arrival_s)
    first_s = found[0].arrival_s
    return [Arrival((a.arrival_s - first_s) / speed, a.prompt_tokens, a.output_tokens) for a in found]


def poisson(rate: float, prompt_tokens: int, output_tokens: int, seed: int) -> Iterable[Arrival]:
    """Arrivals without end, `rate` a second on average, independent of each other."""
    rng, now_s = random.Random(seed), 0.0
    while True:
        yield Arrival(now_s, prompt_tokens, output_tokens)
        now_s += rng.expovariate(rate)


def first_of(arrivals: Iterable[Arrival], requests: int | None, duration_s: float | None) -> list[Arrival]:
    """The arrivals before `duration_s`, at most so many."""
    some = itertools.islice(arrivals, requests)
    return list(itertools.takewhile(lambda a: duration_s is None or a.arrival_s < duration_s, some))


def clipped(
    arrivals: Sequence[Arrival], context: int | None, max_prompt: int | None, max_output: int | None
) -> tuple[list[Arrival], int]:
    """The arrivals with lengths that fit, and how many of them did not: first each length by its own bound, then the
    prompt to what the answer leaves of the context; of an answer at most half of it."""
    found = []
    for a in arrivals:
        prompt, output = (
            min(a.prompt_tokens, max_prompt or a.prompt_tokens),
            min(a.output_tokens, max_output or a.output_tokens),
        )
        if context is not None:
            output = min(output, max(1, context // 2))
            prompt = min(prompt, max(1, context - output))
        found.append(Arrival(a.arrival_s, prompt, output))
    return found, sum(a != b for a, b in zip(arrivals, found, strict=True))
