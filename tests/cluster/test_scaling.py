"""Who asked last has it, and what is in the way: `Scaling` over hosts that only remember (real ones: tests/chaos)."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from pregate.base.errors import UnavailableError, UserError
from pregate.cluster import scaling
from pregate.cluster.config import ServeConfig
from pregate.cluster.placement import check
from pregate.cluster.rebalance import slowest_load
from pregate.cluster.routed_experts import RoutedExperts
from pregate.cluster.scaling import Scaling

NUM_ROUTED = (8, 8, 8)


class Part:
    pulse = True


class Hosts:
    """Hosts that come up at once. `faults` are raised by the next calls of `move`, `fault` by `add`."""

    def __init__(self, placement) -> None:
        self.placement, self.parts = placement, [Part() for _ in range(placement.num_hosts)]
        self.num_moves, self.faults, self.fault = 0, [], None
        self.draining: dict[int, Exception | None] = {}  # hosts, and what keeps them where they are

    async def reserve(self, num_hosts) -> None:
        await asyncio.sleep(0)

    def nodes(self, num_hosts):
        return ["here", "there"] * (num_hosts // 2) + ["here"] * (num_hosts % 2)

    def on_draining_nodes(self):
        return [*self.draining]

    async def move_elsewhere(self, host) -> None:
        if (fault := self.draining[host]) is not None:
            raise fault
        del self.draining[host]

    async def add(self, target) -> None:
        await asyncio.sleep(0)
        if self.fault is not None:
            raise self.fault
        self.parts += [Part() for _ in range(target.num_hosts - len(self.parts))]

    async def move(self, placement) -> None:
        await asyncio.sleep(0)
        if self.faults:
            raise self.faults.pop()
        check(placement, NUM_ROUTED, max_units=24)
        before = self.placement.copies[..., :1] if placement.copies.shape[2] == 1 else placement.copies
        assert (placement.copies[..., :1] != before[..., :1]).sum() <= scaling.UNITS_AT_A_TIME * len(self.parts)
        self.placement, self.num_moves = placement, self.num_moves + 1

    async def leave(self, num_hosts) -> None:
        assert self.placement.copies.max() < num_hosts, "a host is left when it serves nothing"
        del self.parts[num_hosts:]
        self.placement = replace(self.placement, num_hosts=num_hosts)


def run(scenario, **values):
    """Run a scenario of a `Scaling`, its hosts, and the rows that its one engine has counted."""
    config = ServeConfig.from_dict({"model": "/m", "hosts": 2, "start_timeout_s": 5.0, **values})
    experts = RoutedExperts(NUM_ROUTED, False)

    async def main():
        rows_LR = np.zeros((3, 8), dtype=np.int64)
        hosts = Hosts(experts.placement(config))

        async def tell(method, *arguments):
            return [{"lost_hosts": [""] * len(hosts.parts), "unit_rows": rows_LR.copy()}[method]]

        await asyncio.wait_for(scenario(Scaling(hosts, experts, config, tell), hosts, rows_LR), 20)  # pyright: ignore

    asyncio.run(main())


def test_of_100_calls_at_once_each_is_answered_and_the_last_is_what_there_is():
    async def scenario(scale, hosts, rows_LR):
        wanted = [int(n) for n in np.random.default_rng(0).integers(1, 9, size=100)]
        answers = await asyncio.gather(*(scale.to(number) for number in wanted))
        for number, answer, following in zip(wanted, answers, [*wanted[1:], None], strict=True):
            assert answer.get("superseded_by", answer["hosts"]) in ({number} | {*wanted})
            assert number == following or following is None or answer["superseded_by"] == following
        assert answers[-1] == {"hosts": wanted[-1]}
        assert len(hosts.parts) == wanted[-1]
        check(hosts.placement, NUM_ROUTED)

    run(scenario)


def test_a_call_in_the_midst_of_another_goes_on_from_there():
    async def scenario(scale, hosts, rows_LR):
        first = asyncio.ensure_future(scale.to(8))
        while not hosts.num_moves:
            await asyncio.sleep(0)
        assert await scale.to(3) == {"hosts": 3}
        assert await first == {"hosts": 8, "superseded_by": 3}
        assert await scale.to(3) == {"hosts": 3}
        check(hosts.placement, NUM_ROUTED)

    run(scenario)


def test_what_fails_in_passing_is_done_again_and_what_cannot_be_is_said(monkeypatch):
    monkeypatch.setattr(scaling, "AGAIN_S", 0.01)

    async def scenario(scale, hosts, rows_LR):
        hosts.faults = [asyncio.TimeoutError(), UnavailableError("no engine runs")]
        assert await scale.to(4) == {"hosts": 4}
        hosts.fault = UnavailableError("no room for another host within 5 s")
        with pytest.raises(UnavailableError, match="no room for another host"):
            await scale.to(6)
        assert len(hosts.parts) == 4
        with pytest.raises(UserError, match="hosts 9: allowed: 0 to 8"):
            await scale.to(9)
        assert await scale.to(1) == {"hosts": 1}

    run(scenario)


def test_units_follow_use_and_stay_when_little_would_be_gained():
    async def scenario(scale, hosts, rows_LR):
        notes = []

        async def look(more_LR):
            rows_LR[:] += more_LR
            scale._looked_s -= 10
            notes.extend(scale.look())
            while not scale._task.done():
                await asyncio.sleep(0)

        even, skewed = np.full((3, 8), 100), np.full((3, 8), 10)
        homes = hosts.placement.hosts_of
        skewed[homes == 0] = 200
        await look(0)
        for _ in range(3):
            await look(even + np.random.default_rng(1).integers(0, 3, size=(3, 8)))
        assert hosts.num_moves == 0
        for _ in range(6):
            await look(skewed)
        await look(0)
        assert hosts.num_moves
        assert slowest_load(hosts.placement, skewed.astype(float)).sum() < 0.8 * 3 * 800
        assert "units were moved to where use asks for them" in " ".join(notes)

    run(scenario, placement="balanced", rebalance_s=1.0)


def test_a_number_beyond_those_of_the_deployment_is_refused():
    async def scenario(scale, hosts, rows_LR):
        with pytest.raises(UserError, match=r"hosts 5: allowed: 2 \(min_hosts\) to 4"):
            await scale.to(5)

    run(scenario, min_hosts=2, max_hosts=4)


def test_copies_of_a_unit_go_to_several_nodes():
    async def scenario(scale, hosts, rows_LR):
        assert await scale.to(6) == {"hosts": 6}
        copies = hosts.placement.copies
        assert (copies[..., 1] >= 0).sum() == 12, "half of all units have a second copy"
        assert (copies[..., 0] % 2 != copies[..., 1] % 2)[copies[..., 1] >= 0].all(), "one here and one there"

    run(scenario, placement="balanced", replicas=0.5)


def test_hosts_leave_nodes_that_ray_is_to_take_away_and_a_call_meanwhile_is_answered(monkeypatch):
    monkeypatch.setattr(scaling, "DRAINING_EVERY_S", 0.0)

    async def scenario(scale, hosts, rows_LR):
        hosts.draining = {0: None, 1: UnavailableError("no room for another host within 60 s")}
        scale.look()
        assert await scale.to(3) == {"hosts": 3}
        assert scale.look()[:2] == [
            "host 0 was moved: Ray is to take its node away",
            "host 1 is still on a node that Ray is to take away: no room for another host within 60 s",
        ]
        assert [*hosts.draining] == [1]
        hosts.draining[1] = None
        while hosts.draining:
            await asyncio.sleep(0.01)
            scale.look()

    run(scenario)
