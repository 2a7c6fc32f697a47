"""How long it takes to choose a step: the scheduler that serves, all of whose requests decode.

    python -m benchmarks.plan_time

Paths are drawn at random, new ones for every token; a step takes in all requests. Milliseconds of
`Scheduler.next_step`: median, 95 in a hundred and least of `--steps`, first come, first served beside it.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np

from pregate.model.packed_paths import PackedPaths
from pregate.model.paths import Paths
from pregate.router.engine.batching import PathBatcher, StepCosts, UnitLayout
from pregate.router.engine.blocks import BlockAllocator
from pregate.router.engine.scheduler import Scheduler, SchedulerLimits
from pregate.router.engine.sequence import Sequence
from pregate.router.link.messages import SamplingParams

SHAPES: tuple[dict[str, int], ...] = (
    {"layers": 32, "routed": 8, "active": 2, "hosts": 1},
    {"layers": 32, "routed": 8, "active": 2, "hosts": 8},
    {"layers": 32, "routed": 16, "active": 4, "hosts": 1},
    {"layers": 32, "routed": 7, "active": 1, "hosts": 1},
)


def random_ids(rng: np.random.Generator, num: int, shape: dict[str, int]) -> np.ndarray:
    ids = np.argsort(rng.random((num, shape["layers"], shape["routed"])), axis=2)[..., : shape["active"]]
    return np.sort(ids, axis=2).astype(np.int16)


def times_s(shape: dict[str, int], num: int, num_steps: int, by_path: bool) -> list[float]:
    """Seconds of each choice of a step."""
    rng, hosts = np.random.default_rng(0), shape["hosts"]
    layout = UnitLayout(
        np.tile(np.arange(shape["routed"]) * hosts // shape["routed"], (shape["layers"], 1)),
        [5_000_000] * shape["layers"],
        hosts,
    )
    costs = StepCosts((5e-5,) * hosts, (1e-10,) * hosts, (6e-10,) * hosts, 1e-4, 2e-2, 2e-3)
    limits = SchedulerLimits(num, 2 * num, 2 * num, max_batching_delay_s=1e9)
    batcher = PathBatcher(layout, costs) if by_path else None
    scheduler = Scheduler(limits, BlockAllocator(num * 16, 16), False, "fifo", batcher)
    for n in range(num):
        one = Sequence(str(n), [1], 1, num_steps + 9, SamplingParams(num_steps + 9), 0, None, np.zeros(1))
        one.paths = PackedPaths.of(Paths(random_ids(rng, 1, shape)), shape["routed"] - 1)
        scheduler.add(one)
    found = []
    for number in range(num_steps + 5):
        begun_s = time.perf_counter()
        step = scheduler.next_step(float(number))
        found.append(time.perf_counter() - begun_s)
        assert len(step) == num, "everybody runs"
        scheduler.complete(step)
        for piece, rows_U in zip(step, layout.rows_each(random_ids(rng, num, shape)), strict=True):
            piece.sequence.token_ids.append(1)
            piece.sequence.next_rows_U = rows_U
    return found[5:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    print(f"{given.requests} requests, {given.steps} steps, load average {os.getloadavg()[0]:.2f}; ms")
    for shape in SHAPES:
        said: list[Any] = []
        for by_path in (True, False):
            ms = np.array(times_s(shape, given.requests, given.steps, by_path)) * 1e3
            said.append(f"{np.median(ms):.3f}, {np.percentile(ms, 95):.3f}, {ms.min():.3f}")
        print(f"{shape}: by path {said[0]}; first come {said[1]}", flush=True)


if __name__ == "__main__":
    main()
