"""What a deployment of real processes bears, and how soon a death in it is seen: steps of 30 s, stops, floods, kills.

    python -m benchmarks.liveness --model examples/quartet-paths --long-model SMOLLM2_CUT

`--long-model` needs a context of thousands of tokens: its prompts make one step last 30 s. Requests have a deadline of
ten minutes; every one that ends otherwise than complete is counted. Health is asked without a pause, each time over a
connection of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.deployment import Deployment, deployed
from benchmarks.liveness_report import write_report
from benchmarks.surroundings import ROOT, surroundings
from benchmarks.watching import DEADLINE_S, PATIENCE_S, Busy, Health, Request
from pregate.client.client import Client
from tests.cluster.leftovers import shared_memory

FROZEN_S = 20.0
#: In (a) and (b) so many requests decode meanwhile.
NUM_RUNNING = 8


def prompts(deployment: Deployment, count: int, num_tokens: int | None = None, room: int = 8) -> list[list[int]]:
    """So many random prompts; their length None fills the context but for `room` tokens."""
    with Client(deployment.target, timeout_s=PATIENCE_S, retry_s=0) as client:
        info = client.model_info()
    length, draw = num_tokens or info.max_context_length - room, random.Random(count)
    return [[draw.randrange(3, info.vocab_size) for _ in range(length)] for _ in range(count)]


def start(deployment: Deployment, given: list[list[int]], max_tokens: int) -> list[Request]:
    return [Request(deployment.target, prompt, max_tokens) for prompt in given]


def wait_begun(requests: list[Request]) -> None:
    for request in requests:
        if not request.begun.wait(PATIENCE_S):
            raise TimeoutError(f"no first token within {PATIENCE_S:.0f} s: {request.error}")


def outcome(requests: list[Request]) -> dict[str, Any]:
    """Wait for the end of all; how many there were and which failed."""
    for request in requests:
        request.join(DEADLINE_S)
    failed = [request.error for request in requests if request.error is not None]
    return {"requests": len(requests), "failed": failed, "tokens": sum(r.num_tokens for r in requests)}


class Run:
    """Everything measured so far, by part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.found = args, {"bears": {}, "starts": {}, "kills": []}

    @contextmanager
    def serving(self, name: str, model: Path, *arguments: object) -> Iterator[Deployment]:
        """A deployment that has given its first token; what its start went to is kept under `name`."""
        before, began_s = shared_memory(), time.monotonic()
        with deployed(model, *arguments) as deployment:
            (first,) = start(deployment, [[5, 6, 7]], 1)
            wait_begun([first])
            first_token_s = round(time.monotonic() - began_s, 1)
            self.found["starts"][name] = {"first_token_s": first_token_s, "stages": deployment.stages}
            yield deployment
            left = deployment.stop() + sorted(shared_memory() - before)
            print(f"{name}: left behind: {left}", flush=True)
            self.found.setdefault("left", []).extend(left)

    def bears(self, name: str, deployment: Deployment, requests: list[Request], during: Any = lambda: None) -> None:
        """Watch health until `requests`, which have begun, and `during` have ended."""
        began_s, health, busy = time.monotonic(), Health(deployment.target), Busy(deployment.target)
        more = during() or []
        self.found["bears"][name] = {
            **outcome([*requests, *more]),
            "seconds": round(time.monotonic() - began_s, 1),
            "longest_step_s": busy.stop(),
            **health.stop(),
        }
        print(f"{name}: {self.found['bears'][name]}", flush=True)


def long_step(run: Run) -> None:
    """(a) Prompts so long that one step takes 30 s, in the middle of running requests."""
    count = run.args.long_prompts
    arguments = ("--hosts", 2, "--step-tokens", run.args.long_tokens * count + NUM_RUNNING)
    with run.serving("long step, 2 hosts", run.args.long_model, *arguments) as deployment:
        running = start(deployment, prompts(deployment, NUM_RUNNING, 32), 64)
        wait_begun(running)
        long = prompts(deployment, count, run.args.long_tokens)
        run.bears("a step of 30 s", deployment, running, lambda: start(deployment, long, 8))


def frozen(run: Run) -> None:
    """(b) The engine is stopped for 20 s and goes on."""
    with run.serving("quartet, 2 hosts", run.args.model, "--hosts", 2) as deployment:
        running = start(deployment, prompts(deployment, NUM_RUNNING, 32), 400)
        wait_begun(running)
        (engine,) = deployment.parts("engine")

        def stop_and_go() -> None:
            engine.suspend()
            time.sleep(FROZEN_S)
            engine.resume()

        run.bears("engine stopped for 20 s", deployment, running, stop_and_go)


def flood(run: Run) -> None:
    """(c) 100 prompts of the full context at once."""
    with run.serving("quartet, no host", run.args.model, "--hosts", 0) as deployment:
        given = prompts(deployment, 100)
        run.bears("100 full contexts at once", deployment, [], lambda: start(deployment, given, 8))


@contextmanager
def busy_machine(num_processes: int) -> Iterator[None]:
    """So many processes that take all they get."""
    with ExitStack() as stack:
        for _ in range(num_processes):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(process.wait, PATIENCE_S)
            stack.callback(process.kill)
        yield


def kill(run: Run, role: str, num_busy: int) -> None:
    """(d) `kill -9` of a process while a request runs: when the screen says so, what becomes of the request, and when
    the next one is served. All are started again; a request outlives a host."""
    name = f"{role} killed, {num_busy} busy processes beside"
    with run.serving(name, run.args.model, "--hosts", 2) as deployment, busy_machine(num_busy):
        del run.found["starts"][name]
        (request,) = start(deployment, prompts(deployment, 1, 8), 480)
        wait_begun([request])
        victim, killed_s = deployment.parts(role)[0], time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        seen: dict[str, Any] = {"role": role, "busy": num_busy}
        said_s, seen["screen"] = deployment.said("is lost", "its process died")
        served_s = served_again(deployment)
        request.join(PATIENCE_S)
        times = {"screen": said_s, "served": served_s, "ended": request.ended_s}
        seen |= {"client": request.error, "seconds": {k: round(t - killed_s, 2) for k, t in times.items()}}
        run.found["kills"].append(seen)
        print(f"{name}: {seen}", flush=True)


def served_again(deployment: Deployment) -> float:
    """Ask for a token until one comes; returns when it did."""
    give_up_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up_s:
        (request,) = start(deployment, [[5, 6, 7]], 1)
        request.join(PATIENCE_S)
        if request.error is None:
            return request.ended_s
    raise TimeoutError(f"nothing was served within {PATIENCE_S:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a small routed checkpoint with exact paths")
    parser.add_argument("--long-model", type=Path, help="one of a long context; without, the long step is left out")
    parser.add_argument("--long-tokens", type=int, default=8000, help="tokens of a prompt of the long step")
    parser.add_argument("--long-prompts", type=int, default=1)
    parser.add_argument("--busy", type=int, nargs="*", default=[0, 2], help="kill beside so many busy processes")
    parser.add_argument("--parts", nargs="+", default=["frozen", "flood", "kill", "long"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "liveness.json")
    args = parser.parse_args()
    run = Run(args)
    parts = {"long": [long_step] if args.long_model else [], "frozen": [frozen], "flood": [flood]}
    roles = ("engine", "expert hosts", "front door")
    parts["kill"] = [partial(kill, role=role, num_busy=busy) for busy in args.busy for role in roles]
    around = surroundings("liveness", ("ray", "grpcio", "pyzmq"))
    for measure in (measure for part in args.parts for measure in parts[part]):
        measure(run)
        results = run.found | around
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        write_report(results, args.out)


if __name__ == "__main__":
    main()
