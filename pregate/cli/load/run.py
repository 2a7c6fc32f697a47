"""Sending a load: each request when it is due, whether or not others are done (an open loop)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from pregate.cli.load.arrivals import Arrival
from pregate.cli.load.outcome import Outcome
from pregate.cli.load.targets import RequestError, Target

#: Counters of a server, of which a load takes the difference.
COUNTERS = ("num_steps", "num_step_tokens", "num_step_units", "unit_hits", "unit_misses")


async def send(
    target: Target,
    arrivals: Sequence[Arrival],
    prompts: Sequence[Sequence[int]],
    timeout_s: float,
    ended: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Send every request when it is due and wait for all of them; `ended` hears of each."""
    start_s = time.perf_counter()
    # Kept here, and not by the loop alone, which would drop one that nobody holds.
    tasks = []
    for arrival, prompt in zip(arrivals, prompts, strict=True):
        await asyncio.sleep(max(0.0, start_s + arrival.arrival_s - time.perf_counter()))
        tasks.append(asyncio.ensure_future(_one(target, arrival, prompt, timeout_s, start_s, ended)))
    return list(await asyncio.gather(*tasks))


async def _one(
    target: Target,
    arrival: Arrival,
    prompt: Sequence[int],
    timeout_s: float,
    start_s: float,
    ended: Callable[[Outcome], None],
) -> Outcome:
    outcome = Outcome(arrival.arrival_s, len(prompt))
    try:
        async for num_tokens in target.generate(prompt, arrival.output_tokens, timeout_s):
            outcome.token_s += [time.perf_counter() - start_s] * num_tokens
        if not outcome.token_s:
            outcome.error = "NO_TOKENS"
    except RequestError as error:
        outcome.error = error.status
    outcome.ended_s = time.perf_counter() - start_s
    ended(outcome)
    return outcome


def of_server(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What the server counted meanwhile: batch sizes, units a step, hit rate; as far as it says so."""
    steps, tokens, units, hits, misses = (after.get(name, 0) - before.get(name, 0) for name in COUNTERS)
    found: dict[str, Any] = {"batching": after["batching"]} if after.get("batching") else {}
    if steps:
        found |= {"steps": steps, "tokens_per_step": round(tokens / steps, 2)}
        found |= {"units_per_step": round(units / steps, 2)} if units else {}
    if hits + misses:
        found["unit_hit_rate"] = round(hits / (hits + misses), 4)
    return found
