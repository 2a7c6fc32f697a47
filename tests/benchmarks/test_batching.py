"""The simulation of batches: every request comes to its end under every policy, and units are counted as they are."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.batching import POLICIES, Setting, Text, Work, run
from pregate.cli.load.arrivals import Arrival

COSTS = {"row_s": 1e-5, "resident_byte_s": 1e-8, "missing_byte_s": 1e-7, "step_s": 1e-3, "token_s": 1e-4}
COSTS |= {"dispatch_s": 0.0, "remote_dispatch_s": 1e-4}


def work(num: int) -> Work:
    """Requests of one index for all of three layers, out of four experts."""
    rng, texts = np.random.default_rng(0), []
    for n in range(num):
        arrival = Arrival(n * 0.01, int(rng.integers(1, 20)), int(rng.integers(1, 10)))
        index_T = rng.integers(0, 4, arrival.prompt_tokens + arrival.output_tokens)
        texts.append(Text(arrival, np.tile(index_T[:, None, None], (1, 3, 1)).astype(np.int16)))
    return Work(texts, [4] * 3, [100_000] * 3)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("num_hosts", "resident"), [(1, 1.0), (2, 0.5)])
def test_every_request_ends_and_figures_fit_each_other(policy, num_hosts, resident):
    load = work(40)
    found = run(Setting(policy, num_hosts, resident, 16, 8, 1.0, 0.2), load, COSTS, 32)
    assert found["ended"] == 40
    num_tokens = sum(t.arrival.prompt_tokens + t.arrival.output_tokens - 1 for t in load.texts)
    assert found["tokens_per_step"] * found["steps"] == pytest.approx(num_tokens, rel=0.01)
    assert 1 <= found["units_per_step_and_layer"] <= 4
    assert (found["hit_rate"] == 1) == (resident == 1)
