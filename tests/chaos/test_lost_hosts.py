"""Hosts that are killed or stopped at random moments, under 16 requests: every text is the reference's.

`make chaos` kills more often than `make test`, and writes down how long clients saw nothing.
"""

import json
import os
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest

from pregate.cluster.placement import place
from pregate.model.checkpoint import CheckpointReader
from pregate.router.engine.build import build_engine
from pregate.router.engine.options import EngineOptions
from tests.chaos.hosts import At, Cluster, hold_round, random_references, until_all_is_loaded, until_all_serve

pytestmark = pytest.mark.slow
NUM_HOSTS, NUM_PROMPTS, NUM_TOKENS = 3, 16, 20
#: In `make test` a few kills of one kind, in `make chaos` many of all: starting a process takes seconds.
NUM_KILLS = int(os.environ.get("PREGATE_CHAOS_KILLS", "2"))
ALL = "PREGATE_CHAOS_KILLS" in os.environ
RESULTS = os.environ.get("PREGATE_CHAOS_RESULTS")


@pytest.fixture(scope="module", params=["path", "layerwise"][: 1 + ALL])
def model(request, tiny_layerwise_checkpoint, tiny_path_checkpoint):
    path = tiny_path_checkpoint if request.param == "path" else tiny_layerwise_checkpoint
    return path, random_references(path, 7, NUM_PROMPTS, NUM_TOKENS)


@pytest.fixture(scope="module", params=[0.0, 1.0][: 1 + ALL])
def served(request, model, tmp_path_factory):
    """An engine over three host processes, and what its texts are to be."""
    path, references = model
    num_routed = [cut.num_routed for cut in CheckpointReader(path).config.cuts]
    placement = place(num_routed, NUM_HOSTS, "balanced", replicas=request.param)
    cluster = Cluster(path, placement.copies, tmp_path_factory.mktemp("ipc"))
    clients = [cluster.client(host) for host in range(NUM_HOSTS)]
    options = EngineOptions(model=str(path), step_tokens=64, prefix_sharing=False, max_running=NUM_PROMPTS)
    engine = build_engine(options, clients, placement.copies)
    yield cluster, engine, references, f"{path.name}, {request.param:.0%} copies"
    for client in engine.exchange.clients:
        client.close()
    cluster.close()


def test_any_host_killed_at_any_moment(served):
    """And replaced at another, in the midst of it or afterwards."""
    cluster, engine, references, name = served
    rng, pauses_s = np.random.default_rng(NUM_KILLS), []
    at = At(engine)
    try:
        hold_round(engine, references, "quiet")
        in_a_round = at.num_seen
        for _ in range(NUM_KILLS):
            host = int(rng.integers(NUM_HOSTS))
            when, back = sorted(rng.integers(1, in_a_round, size=2).tolist())
            at.do(when, lambda host=host: cluster.kill(host))
            in_the_midst = bool(rng.integers(2)) and back > when
            if in_the_midst:
                at.do(back, lambda host=host: cluster.replace(host, engine))
            longest_s = hold_round(engine, references, f"host {host} killed before dispatch {when}")
            if not in_the_midst:  # else starting it took that long
                pauses_s.append(longest_s)
                until_all_is_loaded(engine)
                cluster.replace(host, engine)
            until_all_serve(engine)
            assert engine.info()["hosts"][host]["lost"] == ""
    finally:
        at.stop()
    print(f"{name}: {NUM_KILLS} kills, pauses {[round(s, 2) for s in pauses_s]} s")
    note(name, pauses_s)


def note(name: str, pauses_s: list[float]) -> None:
    if RESULTS is None or not pauses_s:
        return
    path = Path(RESULTS)
    found = json.loads(path.read_text()) if path.exists() else {}
    found[name] = {"kills": NUM_KILLS, "p50_s": statistics.median(pauses_s), "worst_s": max(pauses_s)}
    path.write_text(json.dumps(found, indent=1) + "\n")


def test_a_stopped_host_is_fenced_and_taken_back_when_it_wakes(served):
    """What it says of the old step when it wakes is discarded."""
    cluster, engine, references, _ = served
    pid, at = cluster.processes[1].pid, At(engine)
    try:
        at.do(20, lambda: os.kill(pid, signal.SIGSTOP))
        assert hold_round(engine, references, "host 1 stopped") < 30
        assert "its connection is cut" in engine.exchange.lost[1] or "silent for" in engine.exchange.lost[1]
    finally:
        at.stop()
        os.kill(pid, signal.SIGCONT)
    until_all_serve(engine)
    hold_round(engine, references, "host 1 awake again")
    assert not engine.exchange.lost


def test_two_of_three_at_once_and_all_of_them(served):
    cluster, engine, references, _ = served
    at = At(engine)
    for hosts in ([0, 2], [0, 1, 2]):
        try:

            def lose(hosts=hosts):
                for host in hosts:
                    cluster.kill(host)
                if len(hosts) == NUM_HOSTS:  # nobody is left to serve on: they come back while requests wait
                    for host in hosts:
                        cluster.replace(host, engine)

            at.do(30, lose)
            hold_round(engine, references, f"hosts {hosts} killed")
        finally:
            at.stop()
        for host in hosts:
            if host in engine.exchange.lost and "replaced" not in engine.exchange.lost[host]:
                cluster.replace(host, engine)
        until_all_serve(engine)
        at = At(engine)
    at.stop()
