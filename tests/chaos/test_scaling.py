"""More hosts and fewer, on a real Ray, while clients ask: no request fails, and every text is the reference's."""

import asyncio
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import ray

from pregate.base.options import to_dict
from pregate.cli.main import main
from pregate.client.client import Client
from pregate.cluster import host_load
from pregate.cluster.calls import call
from pregate.cluster.children import RayChildren
from pregate.cluster.config import ServeConfig
from pregate.router.doors.grpc_options import GrpcOptions
from tests.chaos.deployed import deployed, processes
from tests.chaos.hosts import random_references
from tests.chaos.load import NUM_CLIENTS, Load, look_until
from tests.router.running import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_PROMPTS, NUM_TOKENS, NUM_CALLS = 8, 24, 100
#: In `make test` up and down once, in `make chaos` over and over.
CHAOS = "PREGATE_CHAOS_KILLS" in os.environ
ROUNDS = 5 if CHAOS else 1


@pytest.fixture(scope="module")
def references(tiny_path_checkpoint):
    return random_references(tiny_path_checkpoint, 11, NUM_PROMPTS, NUM_TOKENS)


@pytest.fixture(scope="module")
def deployment(tiny_path_checkpoint):
    with deployed(tiny_path_checkpoint, hosts=1) as made:
        yield made


def hosts_that_serve(target):
    with Client(target, timeout_s=60) as client:
        return [host.num_units for host in client.loads().hosts]


def shared_by(num_hosts, target):
    """Whether each of so many hosts has its share, as of heartbeats half a second old."""
    units = hosts_that_serve(target)
    return (len(units), sum(units), min(units)) == (num_hosts, 18, 18 // num_hosts)


def test_up_and_down_under_load(deployment, references, capsys):
    """As `pregate scale` does it; hosts hold what they serve and no more, and those taken away are gone."""
    _, target = deployment
    with Load(target, references) as load:
        for _ in range(ROUNDS):
            for hosts in (4, 2):
                before = load.num_texts
                assert main(["scale", "--hosts", str(hosts), "--ray-address", "auto"]) == 0
                assert f"{hosts} hosts serve pregate" in capsys.readouterr().out
                wait_for(lambda: shared_by(hosts, target), what="units counted once")  # noqa: B023
                wait_for(lambda: load.num_texts > before + NUM_CLIENTS, what="texts with so many hosts")  # noqa: B023
        wait_for(lambda: len(processes("ExpertHostActor")) == 2, what="the end of hosts that were taken away")
    assert load.num_texts > 8


def test_of_100_calls_at_once_the_last_wins(deployment, references):
    """Each is answered: with its number where that is reached, else with the number that superseded it."""
    made, target = deployment
    supervisor = made._supervisor
    wanted = [int(n) for n in np.random.default_rng(5).integers(1, 5, size=NUM_CALLS)]
    with Load(target, references):
        calls = {supervisor.scale.remote(hosts): hosts for hosts in wanted[:-1]}

        def under_way():
            return {calls[ref] for ref in ray.wait(list(calls), num_returns=len(calls), timeout=0)[1]}

        # Ray keeps no order of calls to an async actor: of 12 runs the last had come before another one once.
        wait_for(lambda: len(under_way()) <= 1, 120, "calls that supersede one another")
        answers = ray.get([*calls, supervisor.scale.remote(wanted[-1])], timeout=300)
        assert all("failure" not in answer for answer in answers), answers
        reached = [(n, a["hosts"]) for n, a in zip(wanted, answers, strict=True) if "superseded_by" not in a]
        assert reached and all(number == hosts for number, hosts in reached)
        assert answers[-1] == {"hosts": wanted[-1]}
        assert len(hosts_that_serve(target)) == wanted[-1] and len(processes("ExpertHostActor")) == wanted[-1]
        wait_for(lambda: sum(hosts_that_serve(target)) == 18, what="units counted once")


def test_a_number_that_cannot_be_is_refused_and_nothing_changes(deployment):
    made, target = deployment
    before = len(hosts_that_serve(target))
    reply = call(made._supervisor, "scale", 7)
    assert reply["failure"]["message"].startswith("--hosts 7: allowed: 0 to 6")
    assert len(hosts_that_serve(target)) == before


@pytest.mark.skipif(not CHAOS, reason="make chaos: what it decides by is tested in tests/cluster")
@pytest.mark.usefixtures("deployment")  # there is a Ray
def test_by_load_and_by_use(tiny_path_checkpoint, references, monkeypatch):
    """Units to where one text wants them, more hosts while clients ask, fewer when nobody asks any more."""
    monkeypatch.setattr(host_load, "UP_S", 3600.0)  # a host that is added takes up what use asks for, and none moves
    monkeypatch.setattr(host_load, "DOWN_S", 3.0)
    bounds = {"hosts": 2, "min_hosts": 1, "max_hosts": 3, "host_load": 0.01, "rebalance_s": 1.0}
    values = {"model": str(tiny_path_checkpoint), "name": "elastic", "placement": "balanced", "drain_s": 1.0, **bounds}

    async def main():
        children, notes = RayChildren(ServeConfig.from_dict(values), Path(sockets)), []

        async def until(wanted):
            await look_until(children, notes, lambda: wanted(" ".join(notes)))

        try:
            await children.start()
            door = await children.add_door("me", to_dict(GrpcOptions(port=0)))
            with Load(f"127.0.0.1:{door['port']}", references[:1] * NUM_PROMPTS):
                await until(lambda said: "units were moved" in said)
                monkeypatch.setattr(host_load, "UP_S", 1.0)
                await until(lambda said: "scaled from 2 to 3 hosts" in said)
            await until(lambda said: "to 1 hosts" in said)
            assert len(children._info["hosts"]) == 1
        finally:
            await children.stop(1.0)

    with tempfile.TemporaryDirectory(prefix="pgt-", dir="/tmp") as sockets:
        asyncio.run(main())
