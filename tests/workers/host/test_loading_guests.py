"""A host whose own units stay, and which is told that it serves another's: they come before anybody asks."""

from typing import Any

import numpy as np
import torch

from pregate.kernels import expert_ffn
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import HostOptions
from pregate.workers.host.prefetch import LEAD_LAYERS
from pregate.workers.host.store import UnitStore
from pregate.workers.link.expected import SURE, Expected
from pregate.workers.link.protocol import GroupIndex, GroupKey
from tests.router.running import wait_for
from tests.workers.host.fetching import fetch_all
from tests.workers.unsteady import UnsteadyReader

#: Of `unit_checkpoint`: layer 0 has six routed experts, layer 1 none, layer 2 five.
HOMES = [(0, 0), (0, 1), (2, 0)]
NOTHING = np.zeros((1, 3, 6), dtype=bool)


def mask(*units: tuple[int, int]) -> np.ndarray:
    found = np.zeros((3, 6), dtype=bool)
    for unit in units:
        found[unit] = True
    return found


def likely(**units: int) -> np.ndarray:
    """Of units written as layer and expert: likely(_03=9) is 9 for expert 3 of layer 0."""
    found = np.zeros((3, 6), dtype=np.uint8)
    for name, value in units.items():
        found[int(name[1]), int(name[2])] = value
    return found


def make_store(reader, spare_slots: int) -> UnitStore:
    ffn = expert_ffn.choose("loop", torch.device("cpu"), torch.float32, act=reader.hidden_act, widths={256, 512})
    return UnitStore(reader, HOMES, ffn.layout, spare_slots=spare_slots)


def test_what_is_needed_first_comes_first_and_all_that_is_expected_comes(reader):
    store = make_store(reader, 8)
    assert fetch_all(store) == [], "nobody has said anything"
    expected = np.stack([mask((2, 3)), mask((0, 5))])
    store.expect("e", Expected(7, expected, likely(_00=1, _20=1, _02=1, _03=SURE, _24=90)))
    # In layers from here: 0, what every step asks for; 2, layer 2 of step 7; 3, layer 0 of step 8; then what a third of
    # all steps ask for; and last what nobody may.
    assert fetch_all(store) == [(0, 3), (2, 3), (0, 5), (2, 4), (0, 2)]
    assert store.stats.evictions == 0 and store.stats.num_units == len(HOMES) + 5


def test_there_is_no_room_but_free_slots(reader):
    """Four of layer 0 fit beside what this host is home to. Nothing leaves for a fifth, however much it is wanted."""
    store = make_store(reader, 0)
    store.expect("e", Expected(1, NOTHING, likely(_02=9, _03=8, _04=7, _05=6, _21=5)))
    assert fetch_all(store) == [(0, 2), (0, 3), (0, 4), (0, 5)]
    store.expect("e", Expected(2, mask((2, 1))[None], likely(_02=9, _03=8, _04=7, _05=6)))
    assert fetch_all(store) == [] and store.stats.evictions == 0


def test_guests_that_nobody_expects_make_way(reader):
    """The host that they are from is back, and another one is lost."""
    store = make_store(reader, 0)
    store.expect("e", Expected(1, NOTHING, likely(_02=1, _03=1, _04=1, _05=1)))
    assert len(fetch_all(store)) == 4
    store.expect("e", Expected(2, NOTHING, likely(_02=1, _21=1, _22=1)))
    assert store.stats.evictions == 2, "as many as are to come"
    assert sorted(fetch_all(store)) == [(2, 1), (2, 2)]
    assert {*HOMES, (0, 2)} <= set(store.units())


def test_while_compute_reads_only_what_is_certain_is_read_beside_it(reader):
    """It is asked for a unit; at that moment, so is the thread that loads ahead."""
    unsteady: Any = UnsteadyReader(reader)
    store, begun = make_store(unsteady, 8), []
    store.expect("e", Expected(1, NOTHING, likely(_03=SURE)))
    read_unit = unsteady.read_unit

    def read(*given):
        begun.append(store.next_fetches(LEAD_LAYERS))
        return read_unit(*given)

    unsteady.read_unit = read
    store.lookup(0, np.array([2], dtype=np.int32))
    store.expect("e", Expected(1, mask((2, 4))[None], likely(_03=SURE)))
    store.lookup(0, np.array([4], dtype=np.int32))
    assert [[load.unit for load in loads] for loads in begun] == [[], [(2, 4)]]


def test_new_homes_wait_for_what_is_loaded_ahead(reader):
    """More slots are another piece of memory: what is written into the old one meanwhile would be lost."""
    store = make_store(reader, 0)
    store.expect("e", Expected(1, NOTHING, likely(_05=1)))
    (load,) = store.next_fetches(LEAD_LAYERS)
    wait, store._changed.wait = store._changed.wait, lambda timeout: store.finish(load) or wait(0)  # type: ignore[method-assign]
    for home in store.rehome([*((0, n) for n in range(6)), *((2, n) for n in range(5))]):
        store.carry_out(home)
    gate_up, down = reader.read_unit(0, 5)
    (slot,) = store.slots(0, np.array([5]))
    assert torch.equal(store.weights(0).gate_up_SMD[slot], gate_up)
    assert torch.equal(store.weights(0).down_SDM[slot], down)
    store.rooms.of(0).pool.check()


def test_a_host_loads_by_itself_and_answers_as_before(reader):
    options = HostOptions(expert_ffn="loop")
    host = ExpertHost(reader, HOMES, options)
    x_ND = torch.randn(2, reader.hidden_size, generator=torch.Generator().manual_seed(1))
    index = GroupIndex(*(np.array(v, dtype=np.int32) for v in ([0, 3], [2, 1], [0, 1, 1])))
    wanted = ExpertHost(reader, [*HOMES, (0, 3)], options).compute(GroupKey("e", 1, 0, 0), x_ND, index)
    host.expect("e", Expected(1, NOTHING, likely(_03=1)))
    wait_for(lambda: host.held_units()[0, 3] and host.status()["num_units"] == 4, what="the unit")
    assert torch.equal(host.compute(GroupKey("e", 1, 0, 0), x_ND, index), wanted)
    assert host.status()["misses"] == 0
    host.close()


def test_without_lookahead_nothing_is_loaded_before_it_is_asked_for(reader):
    host = ExpertHost(reader, HOMES, HostOptions(expert_ffn="loop", lookahead=False))
    host.expect("e", Expected(1, NOTHING, likely(_03=1)))
    assert host._prefetcher is None and not host.held_units()[0, 3]
