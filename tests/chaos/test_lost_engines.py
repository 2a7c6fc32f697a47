"""One of two engines killed in the midst of its streams, on a real Ray: no request fails, and every text is the
reference's. `make chaos`; tests/router/link/test_engines.py does it in one process."""

import os
import shutil
import signal
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray

from pregate.client.client import Client
from pregate.cluster.config import ServeConfig
from pregate.cluster.launch import launch
from pregate.cluster.ray_start import init_local
from pregate.router.doors.grpc_options import GrpcOptions
from tests.chaos.hosts import random_references
from tests.equality import Tally
from tests.router.running import wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif("PREGATE_CHAOS_KILLS" not in os.environ, reason="make chaos"),
]
NUM_PROMPTS, NUM_TOKENS = 16, 60


@pytest.fixture(scope="module")
def deployment(tiny_path_checkpoint):
    """Two engines over two hosts, a supervisor and a door, on a Ray of the tests' own."""
    folder = tempfile.mkdtemp(prefix="pgt-", dir="/tmp")
    init_local(Path(folder) / "ray", 8, namespace="pregate")
    values = {"model": str(tiny_path_checkpoint), "hosts": 2, "engines": 2, "drain_s": 1.0}
    made = launch(ServeConfig.from_dict(values))
    host, port = made.add_door(GrpcOptions(port=0))
    yield made, f"{host}:{port}"
    made.close()
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def engine_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "EngineActor" in " ".join(p.cmdline())]


def serve_all(target, references, at_token=None) -> None:
    """Ask for every text at once, without a client's own retries; `at_token(n)` hears of the n-th token of all."""
    num_tokens, lock, tally = 0, threading.Lock(), Tally()

    def ask(reference):
        nonlocal num_tokens
        with client.generate(reference.prompt, NUM_TOKENS, ignore_eos=True) as stream:
            for chunk in stream:
                with lock:
                    num_tokens += len(chunk.token_ids)
                    if at_token is not None:
                        at_token(num_tokens)
        return stream.completion.token_ids

    with Client(target, timeout_s=120, retry_s=0) as client, ThreadPoolExecutor(NUM_PROMPTS) as pool:
        for number, ids in enumerate(pool.map(ask, references)):
            tally.compare_text(f"prompt {number}", references[number], ids)
    tally.check()
    print(tally)


def test_streams_of_an_engine_that_is_killed_go_on_at_the_other(deployment, tiny_path_checkpoint):
    made, target = deployment
    references = random_references(tiny_path_checkpoint, 13, NUM_PROMPTS, NUM_TOKENS)
    serve_all(target, references)
    first, _ = pids = sorted(process.pid for process in engine_processes())
    killed_at = []

    def kill_one(num_tokens):
        if not killed_at and num_tokens > NUM_PROMPTS * NUM_TOKENS // 3:
            killed_at.append(num_tokens)
            os.kill(first, signal.SIGKILL)

    serve_all(target, references, kill_one)
    assert killed_at and killed_at[0] < NUM_PROMPTS * NUM_TOKENS * 0.9, killed_at
    wait_for(lambda: any("runs again" in note for _, note in made.notes), 60, "another engine")
    after = sorted(process.pid for process in engine_processes())
    assert len(after) == 2 and first not in after and pids[1] in after
    serve_all(target, references)
