"""Threads that ask a running `pregate serve`: for its health, for what it is busy with, for a text."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from pregate.base.errors import PregateError
from pregate.client.client import Client

#: Of every request.
DEADLINE_S = 600.0
#: Of every other wait.
PATIENCE_S = 120.0
ASK_EVERY_S = 0.1


class Health(threading.Thread):
    """Asks for health, and what the engine is busy with, until `stop`: `answers` as (monotonic seconds, what)."""

    def __init__(self, target: str) -> None:
        super().__init__(daemon=True)
        self._target, self._ended = target, threading.Event()
        self.answers: list[tuple[float, str]] = []
        self.longest_busy_s = self.longest_answer_s = 0.0
        self.start()

    def run(self) -> None:
        while not self._ended.wait(ASK_EVERY_S):
            asked_s = time.monotonic()
            what = self._ask()
            self.answers.append((time.monotonic(), what))
            self.longest_answer_s = max(self.longest_answer_s, time.monotonic() - asked_s)

    def _ask(self) -> str:
        try:
            with Client(self._target, timeout_s=5, retry_s=0) as client:
                return "SERVING" if client.health() else "NOT_SERVING"
        except PregateError as error:
            return type(error).__name__

    def stop(self) -> dict[str, Any]:
        self._ended.set()
        self.join(PATIENCE_S)
        answers = [what for _, what in self.answers]
        counts = {what: answers.count(what) for what in sorted(set(answers))}
        return {"health": counts, "longest_health_answer_s": round(self.longest_answer_s, 2)}


class Busy(threading.Thread):
    """Asks what the engine is busy with until `stop`, which returns for how long one step lasted at most."""

    def __init__(self, target: str) -> None:
        super().__init__(daemon=True)
        self._client, self._ended = Client(target, timeout_s=5, retry_s=0), threading.Event()
        self.longest_s = 0.0
        self.start()

    def run(self) -> None:
        while not self._ended.wait(ASK_EVERY_S):
            with contextlib.suppress(PregateError):  # an engine that is stopped tells nothing
                info = self._client.model_info()
                if info.busy_with == "a step":
                    self.longest_s = max(self.longest_s, info.busy_s)

    def stop(self) -> float:
        self._ended.set()
        self.join(PATIENCE_S)
        self._client.close()
        return round(self.longest_s, 1)


class Request(threading.Thread):
    """One running request. `begun` is set by its first token; `error` is None when it ended complete."""

    def __init__(self, target: str, prompt: list[int], max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._target, self._prompt, self._max_tokens = target, prompt, max_tokens
        self.begun = threading.Event()
        self.error: str | None = "it did not end"
        self.num_tokens, self.ended_s = 0, 0.0
        self.start()

    def run(self) -> None:
        try:
            with Client(self._target, timeout_s=DEADLINE_S, retry_s=0) as client:
                for chunk in client.generate(self._prompt, self._max_tokens, ignore_eos=True):
                    self.num_tokens += len(chunk.token_ids)
                    self.begun.set()
            self.error = None
        except PregateError as error:
            self.error = f"{type(error).__name__}: {error}"
        self.ended_s = time.monotonic()
