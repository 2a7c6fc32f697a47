"""What can happen to bytes between an engine and its hosts, through a proxy: every text is the reference's, what does
not come through is noticed, and the hosts serve afterwards as before.

`make chaos` holds every fault for 1.5 and for 30 s, before one host of two and before both; `make test` some.
"""

import os
import threading
import time

import pytest

from pregate.cluster.placement import place
from pregate.model.checkpoint import CheckpointReader
from pregate.router.engine.build import build_engine
from pregate.router.engine.options import EngineOptions
from tests.chaos.hosts import At, Cluster, hold_round, random_references, until_all_serve
from tests.chaos.proxy import DOWN, NONE, UP, Fault, Proxy, doubled, flipped, shortened

pytestmark = pytest.mark.slow
NUM_HOSTS, NUM_PROMPTS, NUM_TOKENS = 2, 16, 20
CHAOS = "PREGATE_CHAOS_KILLS" in os.environ
FAULTS = {
    "cut": Fault(cut=True),
    "half open": Fault(swallow=frozenset((UP, DOWN))),
    "flipped": Fault(damage=flipped),
    "nothing comes up": Fault(swallow=frozenset((UP,))),
    "nothing comes down": Fault(swallow=frozenset((DOWN,))),
    "half open until connected anew": Fault(swallow=frozenset((UP, DOWN)), only_old=True),
    "delayed": Fault(delay_s=0.5),
    "doubled": Fault(damage=doubled),
    "shortened": Fault(damage=shortened),
    "connections out of order": Fault(unsteady_s=0.5),
}
#: Here nothing needs to be noticed: what comes late or twice is as good, and a whole heartbeat may be what is missing.
HARMLESS = {"delayed", "doubled", "shortened"}
CASES = [(name, (1,), 1.5) for name in list(FAULTS)[:3]]
if CHAOS:
    CASES = [(name, hosts, s) for name in FAULTS for hosts in ((1,), (0, 1)) for s in (1.5, 30.0)]


@pytest.fixture(scope="module")
def served(tiny_path_checkpoint, tmp_path_factory):
    """An engine over two host processes, a proxy before each, and what its texts are to be."""
    path = tiny_path_checkpoint
    copies_LRC = place([c.num_routed for c in CheckpointReader(path).config.cuts], NUM_HOSTS, "balanced").copies
    cluster = Cluster(path, copies_LRC, tmp_path_factory.mktemp("ipc"))
    proxies = [Proxy(address.endpoint) for address in cluster.addresses]
    clients = [cluster.client(host) for host in range(NUM_HOSTS)]
    options = EngineOptions(model=str(path), step_tokens=64, prefix_sharing=False, max_running=NUM_PROMPTS)
    engine = build_engine(options, clients, copies_LRC)
    yield engine, proxies, random_references(path, 7, NUM_PROMPTS, NUM_TOKENS)
    for one in (*clients, *proxies, cluster):
        one.close()


@pytest.mark.parametrize(("name", "hosts", "duration_s"), CASES)
def test_no_fault_changes_a_text_or_stays(served, name, hosts, duration_s):
    engine, proxies, references = served
    before, began_s, at = [c.stats.renewals for c in engine.exchange.clients], time.monotonic(), At(engine)
    ended = threading.Event()

    def begin() -> None:
        for host in hosts:
            proxies[host].fault = FAULTS[name]
        threading.Timer(duration_s, end).start()

    def end() -> None:
        for host in hosts:
            proxies[host].fault = NONE
        ended.set()

    at.do(20, begin)
    num_rounds, longest_s = 0, 0.0
    try:
        while not ended.is_set() or not num_rounds:
            longest_s = max(longest_s, hold_round(engine, references, f"{name} {num_rounds}"))
            num_rounds += 1
    finally:
        at.stop()
        end()
    clients, lost_at_s = engine.exchange.clients, engine.exchange.lost_at_s
    noticed = [clients[h].stats.renewals > before[h] or lost_at_s.get(h, 0.0) > began_s for h in hosts]
    until_all_serve(engine)
    renewed = [client.stats.renewals - num for client, num in zip(clients, before, strict=True)]
    print(f"{name}, hosts {hosts}, {duration_s} s: {num_rounds} rounds, {longest_s:.2f} s, renewed {renewed}")
    assert all(noticed) or name in HARMLESS
    hold_round(engine, references, f"after {name}")
    assert not engine.exchange.lost
