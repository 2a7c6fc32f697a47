"""A store with fewer slots than units: what comes ahead, what stays, what is counted, and what fails."""

import re
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from pregate.base.errors import CheckpointError, DataLossError, UserError
from pregate.kernels import expert_ffn
from pregate.kernels.weights import PlainLayout
from pregate.workers.host.prefetch import LEAD_LAYERS, Prefetcher
from pregate.workers.host.residency import resident_share, share_in_slots
from pregate.workers.host.slots import SlotPool
from pregate.workers.host.source import UnitSource
from pregate.workers.host.store import UnitStore
from pregate.workers.link.expected import SURE, Expected
from tests.workers.host.fetching import fetch_all
from tests.workers.unsteady import UnsteadyReader

#: Of `unit_checkpoint`: layer 0 has six routed experts, layer 1 none, layer 2 five.
UNITS = [(0, n) for n in range(6)] + [(2, n) for n in range(5)]
UNIT_BYTES = 3 * 256 * 512 * 4


def mask(*units: tuple[int, int]) -> np.ndarray:
    found = np.zeros((3, 6), dtype=bool)
    for unit in units:
        found[unit] = True
    return found


def make_store(reader, resident: float, memory_bytes: int = 0, **trouble) -> tuple[UnitStore, Any]:
    unsteady: Any = UnsteadyReader(reader, **trouble)
    ffn = expert_ffn.choose("loop", torch.device("cpu"), torch.float32, act=reader.hidden_act, widths={256, 512})
    source = UnitSource(unsteady, memory_bytes)
    share = resident_share(resident, [reader.unit_bytes(layer) for layer, _ in UNITS])
    store = UnitStore(unsteady, UNITS, ffn.layout, share=share, source=source)
    unsteady.begin()
    return store, unsteady


def ask(store: UnitStore, reader, layer: int, *experts: int) -> None:
    """Look these up: they are in slots, with the checkpoint's weights."""
    slots, weights = store.lookup(layer, np.array(experts, dtype=np.int32))
    for slot, expert in zip(slots.tolist(), experts, strict=True):
        gate_up, down = reader.read_unit(layer, expert)
        assert torch.equal(weights.gate_up_SMD[slot], gate_up) and torch.equal(weights.down_SDM[slot], down)
    store.release()
    store.rooms.of(0).pool.check()


@pytest.mark.parametrize(("resident", "num_slots"), [(0.5, 5), (4, 4), (7.0 * UNIT_BYTES, 7), (11, 11), (1e12, 11)])
def test_room_is_a_share_a_count_or_bytes_of_this_hosts_units(reader, resident, num_slots):
    store, _ = make_store(reader, resident)
    assert store.weights(0).num_slots == store.stats.num_units == num_slots
    assert store.tiered == (num_slots < 11)
    assert store.complete == (num_slots == 11)
    with pytest.raises(UserError, match="resident_experts 1: allowed: 2 or more of a host's 11 experts"):
        make_store(reader, 1)


def test_where_all_fit_packed_none_leaves():
    assert share_in_slots(24.0, [8] * 4, [6] * 4) == (1, False)
    assert share_in_slots(20.0, [8] * 4, [6] * 4) == (0.625, True)
    assert share_in_slots(15.0, [10] * 3, [5] * 3) == (1, False), "though there is no room for two that come and go"
    assert share_in_slots(32.0, [8] * 4, [16] * 4) == (1, True), "none leaves, as they lie that do"
    assert share_in_slots(24.0, [8] * 4, [16] * 4) == (0.75, True)
    assert share_in_slots(None, [8] * 4, [6] * 4) == share_in_slots(4, [8] * 4, [6] * 4) == (1, False)
    assert share_in_slots(0.5, [8] * 4, [6] * 4) == (0.5, True)
    assert share_in_slots(3.0, [], []) == (1, False)
    with pytest.raises(UserError, match="resident_experts 14: allowed: 20 bytes or more, room for 2 of a host's 3"):
        share_in_slots(14.0, [10] * 3, [5] * 3)


@pytest.mark.parametrize("unit_bytes", [[10_000_001] * 18, [10**7] * 7 + [3 * 10**6 + 1] * 4, [10**9]])
def test_bytes_that_are_refused_are_said_with_the_least_that_are_not(unit_bytes):
    total = len(unit_bytes)
    with pytest.raises(UserError) as refused:
        resident_share(1_234_567.0, unit_bytes)
    found = re.search(r"resident_experts 1\.23MB: allowed: (\d+) bytes or more", str(refused.value))
    assert found is not None, refused.value
    assert resident_share(float(found[1]), unit_bytes) * total == pytest.approx(min(2, total))
    with pytest.raises(UserError):
        resident_share(float(found[1]) - 1, unit_bytes)


def test_a_plan_is_fetched_in_layer_order_and_only_near_layers(reader):
    """Slots hold experts 0 to 3 of layer 0. The plan uses two of them, and two of layer 2."""
    store, _ = make_store(reader, 4)
    store.plan("e", 1, mask((0, 1), (0, 5), (2, 3), (2, 4)))
    store.expect("e", Expected(2, mask((0, 4), (2, 0))[None], SURE * mask().astype(np.uint8)))
    assert fetch_all(store) == [(0, 5), (2, 3), (2, 4)]
    assert store.units() == [(0, 1), (0, 5), (2, 3), (2, 4)], "those that nobody uses left"
    store.reach("e", 1, 0)
    ask(store, reader, 0, 1, 5)
    assert fetch_all(store) == [], "step 2 begins three layers later"
    store.reach("e", 1, 2)
    assert fetch_all(store) == [(0, 4), (2, 0)], "and one later now; what is used one layer beyond comes with it"
    ask(store, reader, 2, 3, 4)
    stats = store.stats
    assert (stats.hits, stats.misses, stats.prefetched_bytes, stats.wasted_bytes) == (4, 0, 5 * UNIT_BYTES, 0)
    assert stats.stall_s == 0


def test_who_loads_ahead_is_woken_only_where_something_is_due(reader, monkeypatch):
    """Step 2 is the next to use what is missing, in its last layer."""
    store, _ = make_store(reader, 4)
    looks, wakes = [], []
    monkeypatch.setattr(store._changed, "notify_all", lambda: wakes.append(store._at), raising=False)
    monkeypatch.setattr(store.uses, "look", lambda look=store.uses.look: looks.append(store._at) or look())
    store.plan("e", 1, mask((0, 0)))
    store.expect("e", Expected(2, mask((2, 4))[None], SURE * mask((0, 1)).astype(np.uint8)))
    assert fetch_all(store) == []
    wakes.clear()
    for layer in range(3):
        store.reach("e", 1, layer)
        assert store.next_fetches(LEAD_LAYERS) == []
        store.release()
    assert wakes == []
    store.reach("e", 2, 0)
    assert wakes == [("e", 2)]
    assert [load.unit for load in store.next_fetches(LEAD_LAYERS)] == [(2, 4)]
    assert len(looks) == 2, "when it was planned, and when it was due"


def test_what_a_queued_prompt_needs_comes_before_its_step_is_planned(reader):
    store, _ = make_store(reader, 4)
    store.expect("e", Expected(1, mask((0, 5))[None], SURE * mask((0, 0), (0, 1), (0, 2)).astype(np.uint8)))
    assert fetch_all(store) == [(0, 5)]
    assert store.units() == [(0, 0), (0, 1), (0, 2), (0, 5)], "what is likely to be used stays"


def test_what_is_fetched_and_leaves_unused_is_wasted(reader):
    store, _ = make_store(reader, 2)
    store.plan("e", 1, mask((0, 4), (0, 5)))
    assert fetch_all(store) == [(0, 4), (0, 5)]
    store.plan("e", 2, mask((0, 0), (0, 5)))  # the request was cancelled
    assert fetch_all(store) == [(0, 0)]
    store.reach("e", 2, 0)
    ask(store, reader, 0, 0, 5)
    assert (store.stats.prefetched_bytes, store.stats.wasted_bytes) == (3 * UNIT_BYTES, UNIT_BYTES)


def test_nothing_in_use_and_nothing_needed_sooner_leaves(reader):
    store, _ = make_store(reader, 4)
    store.plan("e", 1, mask(*((0, n) for n in range(6))))
    assert fetch_all(store) == [], "all four are used as soon as the two that lack"
    store.reach("e", 1, 0)
    store.lookup(0, np.array([0, 1, 2, 3], dtype=np.int32))
    assert fetch_all(store) == [], "they are in use"
    store.release()
    assert fetch_all(store) == [(0, 4), (0, 5)], "they are done"


def test_waves_take_what_is_held_first_and_half_of_the_slots(reader):
    store, _ = make_store(reader, 4)
    waves = store.waves(0, np.array([0, 2, 3, 4, 5], dtype=np.int32))
    assert [wave.tolist() for wave in waves] == [[0, 1], [2, 3], [4]]
    assert [wave.tolist() for wave in store.waves(0, np.array([1, 4], dtype=np.int32))] == [[0, 1]]


def test_a_unit_of_another_host_comes_and_goes_too(reader):
    unsteady: Any = UnsteadyReader(reader)
    ffn = expert_ffn.choose("loop", torch.device("cpu"), torch.float32, act=reader.hidden_act, widths={256, 512})
    store = UnitStore(unsteady, UNITS[:6], ffn.layout, share=0.5)
    ask(store, reader, 2, 1, 3)
    assert len(store.units()) == 3


def test_host_memory_keeps_what_left_the_device_and_no_more_than_its_budget(reader):
    store, unsteady = make_store(reader, 2, memory_bytes=3 * UNIT_BYTES)
    for _ in range(3):
        for expert in (2, 3, 4):
            ask(store, reader, 0, expert)
    assert unsteady.num_reads == 3, "each was read from the files once"
    ask(store, reader, 2, 0)
    assert store._source.held_bytes == 3 * UNIT_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_unit_is_read_into_its_slot_where_it_lies_as_it_is_stored(reader, dtype, monkeypatch):
    """Without a copy between; into slots of another dtype, and of memory that keeps units, it is copied."""
    written = []
    write = SlotPool.write
    monkeypatch.setattr(SlotPool, "write", lambda pool, *given: (written.append(given[0]), write(pool, *given)))
    for kept in (UNIT_BYTES - 1, UNIT_BYTES):
        store = UnitStore(reader, UNITS[:4], PlainLayout(dtype, torch.device("cpu")), source=UnitSource(reader, kept))
        assert len(written) == (4 if kept == UNIT_BYTES or dtype != torch.float32 else 0)
        written.clear()
        slots, weights = store.lookup(0, np.arange(4, dtype=np.int32))
        for slot, expert in zip(slots.tolist(), range(4), strict=True):
            gate_up, down = reader.read_unit(0, expert)
            assert torch.equal(weights.gate_up_SMD[slot], gate_up.to(dtype))
            assert torch.equal(weights.down_SDM[slot], down.to(dtype))


def test_compute_waits_for_the_unit_it_needs_and_for_no_other(reader):
    """The thread loads ahead, slowly; what is asked for comes, and the wait is counted."""
    store, unsteady = make_store(reader, 5, delay_s=0.02)
    prefetcher = Prefetcher(store)
    try:
        for step in range(1, 6):
            store.plan("e", step, mask(*((0, n) for n in range(5)), *((2, n) for n in range(3))))
            for layer, experts in ((0, range(5)), (2, range(3))):
                store.reach("e", step, layer)
                ask(store, reader, layer, *experts)
    finally:
        prefetcher.stop()
    stats = store.stats
    assert stats.hits + stats.misses == 5 * 8
    assert stats.prefetched_bytes > 0 and stats.wasted_bytes == 0
    assert stats.stall_s > 0
    assert unsteady.num_reads * UNIT_BYTES == stats.read_bytes - 5 * UNIT_BYTES
    assert not prefetcher._thread.is_alive()


def test_a_read_that_fails_once_is_tried_again_and_one_that_fails_for_good_is_said(reader):
    store, unsteady = make_store(reader, 2, fails_every=2)
    for expert in (2, 3, 4):
        ask(store, reader, 0, expert)
    assert unsteady.num_failed == 2
    store, unsteady = make_store(reader, 2, broken={(0, 4)})
    store.plan("e", 1, mask((0, 4), (0, 5)))
    assert fetch_all(store) == [(0, 4), (0, 5)], "a failure ahead is not repeated, and stops nothing"
    with pytest.raises(DataLossError, match=r"unit \(0, 4\) cannot be loaded: the disk did not answer"):
        ask(store, reader, 0, 4)
    store.rooms.of(0).pool.check()
    unsteady.broken.clear()
    ask(store, reader, 0, 4)
    ask(store, reader, 0, 5)


def test_a_read_that_fails_half_way_leaves_the_slot_free(reader):
    """The first matrix is in the slot by then. Tried again, and given back where that fails, too."""
    store, unsteady = make_store(reader, 2)
    read_unit, fails = unsteady.read_unit, [True]

    def half(layer, expert, out=None):
        weights = read_unit(layer, expert, out)
        if fails and fails.pop():
            out[1].zero_()
            raise CheckpointError("the disk did not answer")
        return weights

    unsteady.read_unit = half
    ask(store, reader, 0, 3)
    fails += [True, True]
    with pytest.raises(DataLossError, match=r"unit \(0, 4\) cannot be loaded"):
        ask(store, reader, 0, 4)
    store.release()
    store.rooms.of(0).pool.check()
    ask(store, reader, 0, 5)
    ask(store, reader, 0, 4)


def test_two_that_want_the_same_unit_load_it_once(reader):
    """The thread is at it when compute asks."""
    store, unsteady = make_store(reader, 2, delay_s=0.05)
    store.plan("e", 1, mask((0, 4)))
    (load,) = store.next_fetches(LEAD_LAYERS)
    thread = threading.Thread(target=store.finish, args=(load,))
    thread.start()
    begun_s = time.perf_counter()
    ask(store, reader, 0, 4)
    thread.join()
    assert unsteady.num_reads == 1
    assert store.stats.misses == 1
    assert 0 < store.stats.stall_s < time.perf_counter() - begun_s
