"""The process that is attacked, and what must hold after an attack as before it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from pregate import Client
from tests.router.running import socket_folder, wait_for

ROOT = Path(__file__).resolve().parents[2]
WHOLE = "PREGATE_CHAOS_KILLS" in os.environ
RESULTS = os.environ.get("PREGATE_CHAOS_RESULTS")
NUM_CLIENTS, NUM_MESSAGES = (1000, 100_000) if WHOLE else (20, 300)
#: Clients in a process that is killed: as many as may run and wait.
TOGETHER = 40
#: Memory that an attack may leave: what allocators and caches keep. A leak of 1 KB a message would be 100 MB.
MOST_GROWTH = 48 << 20
PROMPT, TEXT = [1, 40, 41, 42], "O wind that walks"
FINE = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}


@dataclass
class Target:
    """The process that is attacked. `told`: what its wires answered, by name."""

    process: subprocess.Popen
    where: dict[str, Any]
    log: Path
    client: Client
    told: Counter = field(default_factory=Counter)

    @property
    def rss(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def text(self) -> tuple[int, ...]:
        return self.client.complete(PROMPT, 8, ignore_eos=True).token_ids

    def is_idle(self) -> bool:
        loads = self.client.loads()
        waiting = loads.num_running + loads.num_queued + loads.num_waiting_for_paths + loads.num_requests
        metrics = httpx.get(f"http://127.0.0.1:{self.where['http']}/metrics", timeout=20).text
        at_door = [line for line in metrics.splitlines() if line.startswith("pregate_num_requests_at_door{")]
        return not waiting and loads.kv_blocks_free == loads.kv_blocks and at_door[0].endswith(" 0.0")


@contextmanager
def started(checkpoint: Path, log: Path) -> Iterator[Target]:
    """Start it over a checkpoint; it is killed at the end."""
    with socket_folder() as folder, log.open("w") as errors:
        command = [sys.executable, "-m", "tests.chaos.doors_process", str(checkpoint), str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            where = json.loads(line)
            with Client(f"127.0.0.1:{where['grpc']}", timeout_s=60, retry_s=20) as client:
                yield Target(process, where, log, client)
        finally:
            process.kill()
            process.wait(20)


@contextmanager
def under_attack(target: Target, name: str) -> Iterator[Callable[[], None]]:
    """What must hold after an attack as before it; prints what it came to.

    Memory counts from the start, or from where the attack calls what this gives: caches and allocators are full then.
    """
    expected, first, start_s = target.text(), target.rss, time.monotonic()
    before = first

    def settled() -> None:
        nonlocal before
        before = target.rss

    target.told.clear()
    yield settled
    took_s = time.monotonic() - start_s
    wait_for(target.is_idle, 60, f"an idle engine after {name}")
    assert target.process.poll() is None
    assert target.text() == expected
    grown, log = target.rss - before, target.log.read_text()
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:4000]
    filled = before - first
    print(f"\n{name}: {took_s:.1f} s, {filled / 1e6:+.1f} MB, then {grown / 1e6:+.1f} MB, answers {dict(target.told)}")
    if RESULTS:
        path = Path(RESULTS)
        found = json.loads(path.read_text()) if path.exists() else {}
        told = {"filled_bytes": filled, "grown_bytes": grown, "answers": dict(target.told)}
        found[name] = {"seconds": took_s, **told}
        path.write_text(json.dumps(found, indent=1) + "\n")
    assert grown < MOST_GROWTH, f"{name}: {grown / 1e6:.0f} MB"


async def in_parallel(num: int, width: int, one: Callable[[int], Awaitable[None]]) -> None:
    """Call `one` with 0 to `num`, `width` at once."""
    numbers = iter(range(num))

    async def work() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(work() for _ in range(width)))
