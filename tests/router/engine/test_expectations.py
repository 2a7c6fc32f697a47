"""Who is told what to expect when hosts go and come, and that who lives loads it all before it is asked for."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pregate.base.errors import HostLostError
from pregate.model.checkpoint import CheckpointReader
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.paths import Paths
from pregate.router.engine.expectations import Expectations
from pregate.router.engine.members import Members
from pregate.workers.client.host_client import InProcessClient
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import SURE, Expected
from tests.equality import reference_texts
from tests.router.running import wait_for
from tests.router.serving import engine_of, hold, placement_of, units_of
from tests.workers.unsteady import UnsteadyReader

#: Two layers of four units on three hosts, and who serves them without host 0: of each layer a unit goes to each.
COPIES = np.array([[[0], [0], [1], [2]]] * 2, dtype=np.int16)
SERVED = np.array([[1, 2, 1, 2]] * 2)
LOST = HostLostError(0, "it is gone")
PATHS = Paths(np.array([[[0, 2], [1, 2]]], dtype=np.int16), None)


class Told:
    """A host that notes what it is told."""

    def __init__(self, tiered: bool) -> None:
        self.heard: list[Expected] = []
        self.units_LR = np.ones((2, 4), dtype=bool)
        self.held_LR = self.units_LR if tiered else None
        self.back = False

    def expect(self, expected: Expected) -> None:
        self.heard.append(expected)

    def fence(self, hello: Any = None) -> None:
        pass

    def returned(self) -> bool:
        return self.back


def members_of(tiered: bool = False) -> tuple[Members, list[Told]]:
    hosts: Any = [Told(tiered) for _ in range(3)]
    members = Members(hosts, COPIES)
    members.rows_LR[:] = [[100, 1, 0, 0], [0, 50, 0, 0]]
    return members, hosts


def test_nothing_is_expected_of_steps_that_are_measured():
    """They are numbered below 0, which no message can say: hosts took it for damage."""
    members, hosts = members_of(tiered=True)
    expectations = Expectations(members, always=True)
    expectations.tell_anew(-1, PATHS)
    assert not any(host.heard for host in hosts)
    expectations.tell_anew(1, PATHS)
    assert all(host.heard for host in hosts)


def test_who_serves_for_a_lost_host_is_told_of_this_step_the_next_and_all_else():
    members, hosts = members_of()
    expectations = Expectations(members, always=False)
    expectations.tell_anew(7, PATHS)
    assert not expectations.wanted and not any(host.heard for host in hosts), "each has what it serves"
    members.lose(0, LOST)
    expectations.tell_anew(7, PATHS, layer=1)
    assert not hosts[0].heard
    for number in (1, 2):
        (heard,) = hosts[number].heard
        assert heard.step == 7 and heard.known_HLR.shape == (1, 2, 4)
        ahead_LR = np.array([[False] * 4, [False, True, True, False]])  # layer 0 has passed
        assert np.array_equal(heard.known_HLR[0], ahead_LR & (number == SERVED))
        used_LR = np.array([[SURE, 3, 1, 1], [1, 128, 1, 1]])  # as much as asked for so far, and never nothing
        assert np.array_equal(heard.likely_LR, used_LR * (number == SERVED))
    expectations.tell_anew(8, PATHS)
    assert len(hosts[1].heard) == 1, "said once"
    hosts[1].units_LR[0, 0] = False
    assert expectations.wanted, "it has not loaded all of it yet: the engine looks ahead"
    expectations.tell(Expected(9, np.ones((2, 2, 4), dtype=bool), np.full((2, 4), 9, dtype=np.uint8)))
    assert np.array_equal(hosts[1].heard[-1].known_HLR, np.stack([SERVED == 1] * 2))
    assert np.array_equal(hosts[1].heard[-1].likely_LR, 9 * (SERVED == 1))


def test_a_host_that_is_back_ends_it_and_the_next_that_is_lost_begins_anew():
    members, hosts = members_of()
    expectations = Expectations(members, always=False)
    members.lose(0, LOST)
    expectations.tell_anew(1, PATHS)
    hosts[0].back = True
    members.lost_at_s[0] -= 1
    members.look_after_lost()
    expectations.tell_anew(2, PATHS)
    for number in (1, 2):
        assert np.array_equal(hosts[number].heard[-1].likely_LR > 0, COPIES[..., 0] == number), "only its own"
    members.lose(1, LOST)
    expectations.tell_anew(3, PATHS)
    assert [len(host.heard) for host in hosts] == [0, 2, 3]
    assert hosts[2].heard[-1].likely_LR[0, 2] == 1


def test_hosts_that_fetch_anyway_are_told_at_once_and_nothing_more_is_likely():
    members, hosts = members_of(tiered=True)
    expectations = Expectations(members, always=True)
    later_HLR = np.zeros((2, 2, 4), dtype=bool)
    later_HLR[1, 0, 1] = True
    expectations.tell(Expected(5, later_HLR, np.zeros((2, 4), dtype=np.uint8)))
    assert [len(host.heard) for host in hosts] == [1, 1, 1]
    members.lose(0, LOST)
    expectations.tell_anew(4, PATHS)
    heard = hosts[2].heard[-1]
    assert heard.step == 4 and np.argwhere(heard.known_HLR).tolist() == [[0, 1, 1], [2, 0, 1]]
    assert not heard.likely_LR.any()


class LostClient(InProcessClient):
    """A host in this process that falls silent after so many answers."""

    num_answers = 1 << 30

    def receive(self, key, timeout_s):
        self.num_answers -= 1
        if self.num_answers < 0:
            raise LOST
        return super().receive(key, timeout_s)

    def returned(self):
        return False


@pytest.mark.parametrize("kind", ["path", "layerwise"])
def test_who_lives_loads_what_a_lost_host_had_before_it_is_asked_for(request, kind):
    """Lost in the midst of a step, which goes on, slowly reading. In the end all is held though not all was used."""
    path = request.getfixturevalue(f"tiny_{kind}_checkpoint")
    references = reference_texts(RoutedForCausalLM.from_pretrained(path).eval(), [[1, 30, 31], [7, *range(90, 120)]], 6)
    hosts_of, clients, readers = placement_of(path, 3), [], []
    for number in range(3):
        readers.append(UnsteadyReader(CheckpointReader(path), seed=number, delay_s=0.01))
        units, options = units_of(hosts_of, number), HostOptions(host_id=number, spare_slots=9)
        host: Any = ExpertHost(readers[-1], units, options)  # type: ignore[arg-type]
        readers[-1].begin()
        clients.append(LostClient(host))
    with engine_of(path, clients, step_tokens=24) as engine:
        clients[0].num_answers = 1
        hold(engine, f"{kind}, a host lost", references, together=(True,))
        assert 0 in engine.exchange.lost
        members = engine.exchange.members  # type: ignore[attr-defined]
        wait_for(lambda: engine.idle() or not members.catching_up, what="all units held")
        wait_for(
            lambda: all((c.units_LR == c._host._store.states.held_LR).all() for c in clients[1:]), what="all loaded"
        )
        for number in (1, 2):
            assert clients[number].units_LR[members.hosts_of_LR == number].all()
        stats = [client._host.status() for client in clients[1:]]
        assert sum(host["prefetched_bytes"] for host in stats) > 0
        assert not engine.exchange.wants_lookahead


def test_the_lookahead_is_asked_only_while_a_host_lacks_units(tiny_path_checkpoint):
    """It takes time in every step, and where each host has what it serves nobody needs it."""
    path = tiny_path_checkpoint
    hosts_of = placement_of(path, 2)
    options = [HostOptions(host_id=n, spare_slots=9) for n in range(2)]
    clients = [LostClient(ExpertHost(CheckpointReader(path), units_of(hosts_of, n), options[n])) for n in range(2)]
    asked: list[int] = []
    with engine_of(path, clients, step_tokens=24) as engine:
        expect = engine.lookahead.expect  # type: ignore[union-attr]
        engine.lookahead = SimpleNamespace(expect=lambda *a, **k: asked.append(a[0]) or expect(*a, **k))  # type: ignore[assignment]
        references = reference_texts(RoutedForCausalLM.from_pretrained(path).eval(), [[1, 30, 31]], 6)
        hold(engine, "quiet", references, together=(True,))
        assert not asked
        clients[1]._host.expect = lambda engine, expected: None  # type: ignore[method-assign] # it loads nothing ahead
        clients[0].num_answers = 3
        hold(engine, "a host lost", references, together=(True,))
        assert asked, "who lives has not loaded all yet"
