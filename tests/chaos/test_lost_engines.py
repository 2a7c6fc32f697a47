"""One of two engines killed in the midst of its streams, on a real Ray: no request fails, and every text is the
reference's. `make chaos`; tests/router/link/test_engines.py does it in one process."""

import os
import signal

import pytest

from tests.chaos.deployed import ask_all, deployed, processes
from tests.chaos.hosts import random_references
from tests.router.running import wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif("PREGATE_CHAOS_KILLS" not in os.environ, reason="make chaos"),
]
NUM_PROMPTS, NUM_TOKENS = 16, 60


@pytest.fixture(scope="module")
def deployment(tiny_path_checkpoint):
    """Two engines over two hosts."""
    with deployed(tiny_path_checkpoint, hosts=2, engines=2) as made:
        yield made


def test_streams_of_an_engine_that_is_killed_go_on_at_the_other(deployment, tiny_path_checkpoint):
    made, target = deployment
    references = random_references(tiny_path_checkpoint, 13, NUM_PROMPTS, NUM_TOKENS)
    ask_all(target, references)
    first, _ = pids = sorted(process.pid for process in processes("EngineActor"))
    killed_at = []

    def kill_one(num_tokens):
        if not killed_at and num_tokens > NUM_PROMPTS * NUM_TOKENS // 3:
            killed_at.append(num_tokens)
            os.kill(first, signal.SIGKILL)

    ask_all(target, references, kill_one)
    assert killed_at and killed_at[0] < NUM_PROMPTS * NUM_TOKENS * 0.9, killed_at
    wait_for(lambda: any("runs again" in note for _, note in made.notes), 60, "another engine")
    after = sorted(process.pid for process in processes("EngineActor"))
    assert len(after) == 2 and first not in after and pids[1] in after
    ask_all(target, references)
