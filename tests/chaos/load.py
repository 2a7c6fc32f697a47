"""Clients that ask while something is done to the deployment."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

from pregate.client.client import Client
from pregate.cluster.children import RayChildren
from tests.equality import Tally

NUM_CLIENTS = 4


class Load:
    """Clients that ask for one text after another, and hold each to its reference; none may fail."""

    def __init__(self, target, references) -> None:
        self.tally, self.num_texts, self.failures = Tally(), 0, []
        self._target, self._references, self._stopping = target, references, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(NUM_CLIENTS)]

    def _ask(self, first: int) -> None:
        with Client(self._target, timeout_s=120, retry_s=0) as client:
            number = first
            while not self._stopping.is_set():
                reference = self._references[number % len(self._references)]
                try:
                    made = client.complete(reference.prompt, max_tokens=len(reference.tokens), ignore_eos=True)
                except Exception as error:  # noqa: BLE001 - the test fails with it
                    self.failures.append(error)
                    return
                self.tally.compare_text(f"prompt {number % len(self._references)}", reference, made.token_ids)
                self.num_texts += 1
                number += NUM_CLIENTS

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(120)
        assert not self.failures, self.failures[0]
        self.tally.check()


async def look_until(children: RayChildren, notes: list[str], wanted: Callable[[], bool]) -> None:
    """Look after parts as the supervisor does, and add to `notes`; none may be lost."""
    give_up_s = time.monotonic() + 120
    while not wanted():
        assert time.monotonic() < give_up_s, notes
        health = await children.check()
        assert not health.lost
        notes.extend(health.notes)
        await asyncio.sleep(0.2)
