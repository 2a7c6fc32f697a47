"""Load for other measurements: clients that stream from a running `pregate serve` until stdin is closed.

    python benchmarks/streams.py --target 127.0.0.1:50051 --clients 32

Prints one JSON line when every client has had its first token, and another at the end with what was streamed.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time

from pregate.base.errors import PregateError
from pregate.client.client import Client

PROMPTS = ("The harbour lay quiet", "How many loaves are left?", "O wind that walks", "Of all the arts", "In the year")
READY_TIMEOUT_S = 300.0


class Stream(threading.Thread):
    """One client with its own connection, asking again when a text is complete."""

    def __init__(self, target: str, number: int, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._target, self._max_tokens = target, max_tokens
        self._prompt = PROMPTS[number % len(PROMPTS)]
        self._stopping = threading.Event()
        self.first_token = threading.Event()
        self.num_tokens = 0
        self.error: str | None = None

    def run(self) -> None:
        try:
            with Client(self._target) as client:
                while not self._stopping.is_set():
                    self._generate(client)
        except PregateError as error:
            self.error = str(error)

    def _generate(self, client: Client) -> None:
        with client.generate(self._prompt, self._max_tokens, temperature=0.8, ignore_eos=True) as generation:
            for chunk in generation:
                self.num_tokens += len(chunk.token_ids)
                self.first_token.set()
                if self._stopping.is_set():
                    return

    def stop(self) -> None:
        self._stopping.set()


def wait_ready(streams: list[Stream]) -> int:
    """Wait until every stream has its first token, one has failed, or it takes too long; returns how many have it."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s and not any(s.error for s in streams):
        if all(s.first_token.is_set() for s in streams):
            break
        time.sleep(0.05)
    return sum(s.first_token.is_set() for s in streams)


def run(target: str, num_clients: int, max_tokens: int) -> int:
    """Stream until stdin ends; returns the exit code."""
    streams = [Stream(target, number, max_tokens) for number in range(num_clients)]
    for stream in streams:
        stream.start()
    ready = wait_ready(streams)
    started_s, before = time.monotonic(), sum(s.num_tokens for s in streams)
    print(json.dumps({"ready": ready, "clients": num_clients}), flush=True)
    sys.stdin.read()
    seconds = time.monotonic() - started_s
    tokens = sum(s.num_tokens for s in streams) - before
    for stream in streams:
        stream.stop()
    errors = sorted({s.error for s in streams if s.error})
    print(json.dumps({"tokens": tokens, "seconds": seconds, "errors": errors}), flush=True)
    for stream in streams:
        stream.join(5)
    return 1 if errors or ready < num_clients else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()
    sys.exit(run(arguments.target, arguments.clients, arguments.max_tokens))
