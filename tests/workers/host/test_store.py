"""What a host holds of a checkpoint: which unit lies in which slot, what is read when, and what happens to bad ones."""

import shutil

import numpy as np
import pytest
import torch

from pregate.base.errors import DataLossError, UserError
from pregate.kernels import expert_ffn
from pregate.model.checkpoint import CheckpointReader
from pregate.workers.host.store import UnitStore

#: One of `unit_checkpoint`: 3 x 256 x 512 fp32 values.
UNIT_BYTES = 3 * 256 * 512 * 4
UNITS = [(2, 3), (0, 4), (0, 1), (2, 0), (0, 4)]


def i32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def make_store(reader: CheckpointReader, units=UNITS, **options) -> UnitStore:
    ffn = expert_ffn.choose("loop", torch.device("cpu"), torch.float32, act=reader.hidden_act, widths={256, 512})
    return UnitStore(reader, units, ffn.layout, **options)


def hold(store: UnitStore, reader: CheckpointReader, layer: int, experts: list[int]) -> list[int]:
    """These experts of `layer`, and no others, are held with the checkpoint's weights; return their slots."""
    weights, slots = store.weights(layer), store.slots(layer, i32(*experts)).tolist()
    assert [expert for n, expert in store.units() if n == layer] == experts
    for slot, expert in zip(slots, experts, strict=True):
        gate_up, down = reader.read_unit(layer, expert)
        assert torch.equal(weights.gate_up_SMD[slot], gate_up)
        assert torch.equal(weights.down_SDM[slot], down)
    for pool in (room.pool for room in store.rooms):
        pool.check()
    return slots


def test_units_of_all_layers_lie_in_order_in_one_stack_and_are_read_once(reader):
    store = make_store(reader)
    assert store.units() == [(0, 1), (0, 4), (2, 0), (2, 3)]
    assert hold(store, reader, 0, [1, 4]) + hold(store, reader, 2, [0, 3]) == [0, 1, 2, 3]
    assert store.weights(0) is store.weights(2)
    assert store.slots(np.array([2, 0, 0, 2, 0]), i32(3, 1, 4, 0, 0)).tolist() == [3, 0, 1, 2, -1]
    assert (store.stats.num_units, store.stats.units_read, store.stats.misses) == (4, 4, 0)
    assert store.stats.read_bytes == store.stats.held_bytes == 4 * UNIT_BYTES
    assert store.weights(0).num_slots == 4 + 4, "room for the four of layer 0 that others are home to"


def test_a_unit_that_is_missing_is_read_then_and_kept_and_nothing_else_moves(reader):
    store = make_store(reader)
    versions, before = store.versions.copy(), store.weights(0)
    for _ in range(2):
        slots, weights = store.lookup(0, i32(1, 2, 4, 5))
        assert slots.tolist() == [0, 4, 1, 5]
        assert weights is before, "no layer was copied"
        assert hold(store, reader, 0, [1, 2, 4, 5]) == [0, 4, 1, 5]
        assert (store.stats.misses, store.stats.units_read, store.stats.num_units) == (2, 6, 6)
    assert (store.versions - versions).tolist() == [2, 0, 0]
    assert store.lookup(2, i32(3))[0].tolist() == [3]
    assert store.stats.misses == 2


def test_a_guest_leaves_for_another_and_a_home_unit_never(reader):
    """Room for four guests. The one that was not asked for longest goes, unless it is wanted now."""
    store = make_store(reader)
    store.lookup(0, i32(0, 2))
    store.lookup(2, i32(1, 2))
    store.lookup(0, i32(0))
    version = store.versions[0]
    store.lookup(2, i32(4))
    assert store.units() == [(0, 0), (0, 1), (0, 4), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4)]
    assert (store.stats.evictions, store.stats.num_units, store.stats.held_bytes) == (1, 8, 8 * UNIT_BYTES)
    assert store.versions[0] > version, "what was looked up of its layer is no longer true"
    slots, _ = store.lookup(0, np.arange(6, dtype=np.int32))
    assert sorted(slots.tolist()) == [0, 1, 4, 5, 6, 7]
    hold(store, reader, 0, [0, 1, 2, 3, 4, 5])
    hold(store, reader, 2, [0, 3])


def test_spare_slots_leave_room_for_more(reader):
    assert make_store(reader, spare_slots=6).weights(0).num_slots == 4 + 6
    assert make_store(reader, spare_slots=100).weights(0).num_slots == 11, "no more than there are units"
    everything = [(0, n) for n in range(6)] + [(2, n) for n in range(5)]
    store = make_store(reader, everything)
    assert store.complete and store.weights(0).num_slots == 11


@pytest.mark.parametrize("reserve_shared", [True, False])
def test_shared_units_come_first_in_the_map_and_are_not_counted(reader, reserve_shared):
    store = make_store(reader, reserve_shared=reserve_shared)
    shared = [(torch.full((512, 512), float(n)), torch.full((512, 256), -float(n))) for n in range(5)]
    weights = store.weights(0)
    for _ in range(2):  # another engine of this process says the same
        store.hold_shared(0, shared[:2])
        store.hold_shared(2, shared[2:])
    assert (store.weights(0) is weights) == reserve_shared
    for layer, own in ((0, shared[:2]), (2, shared[2:])):
        slots = store.unit_slots(layer)
        assert len(slots) == (8, None, 8)[layer]
        for slot, (gate_up, down) in zip(slots.tolist(), own, strict=False):
            assert torch.equal(store.weights(layer).gate_up_SMD[slot], gate_up)
            assert torch.equal(store.weights(layer).down_SDM[slot], down)
    hold(store, reader, 0, [1, 4])
    hold(store, reader, 2, [0, 3])
    assert store.stats.num_units == 4


def test_a_layer_of_which_nothing_is_held_is_read_when_asked_for(reader):
    store = make_store(reader, [])
    assert store.units() == []
    assert store.lookup(2, i32(2))[0].tolist() == [0]
    hold(store, reader, 2, [2])


@pytest.mark.parametrize(("layer", "expert"), [(0, 6), (0, -1), (1, 0), (2, 5), (3, 0), (-1, 3)])
def test_what_does_not_exist_has_no_slot_and_cannot_be_read(reader, layer, expert):
    """Layer 0 has 6 routed experts, layer 1 none, layer 2 has 5; counted from the end, too, there is none, though the
    last of both is held."""
    store = make_store(reader, [*UNITS, (0, 5)])
    assert store.slots(np.array([0, layer]), i32(4, expert)).tolist() == [1, -1]
    with pytest.raises(UserError, match="not in this checkpoint"):
        store.lookup(layer, i32(expert))
    with pytest.raises(UserError, match="not in this checkpoint"):
        make_store(reader, [(layer, expert)])
    assert store.units() == sorted({*UNITS, (0, 5)})
    hold(store, reader, 0, [1, 4, 5])


def test_a_shard_that_changed_is_refused_and_what_is_held_stays(unit_checkpoint, tmp_path):
    path = tmp_path / "checkpoint"
    shutil.copytree(unit_checkpoint, path)
    (shard,) = path.glob("*.safetensors")
    store = make_store(CheckpointReader(path))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DataLossError, match=r"model\.safetensors: was changed after it was opened"):
        store.lookup(0, i32(1, 2))
    assert (store.stats.num_units, store.versions.tolist()) == (4, [2, 0, 2])
    assert store.lookup(0, i32(1, 4))[0].tolist() == [0, 1]
    hold(store, CheckpointReader(unit_checkpoint), 0, [1, 4])


def test_new_homes_get_slots_and_old_ones_leave_theirs(reader):
    store = make_store(reader)
    store.lookup(0, i32(5))  # a guest
    for load in store.rehome([*((0, n) for n in range(6)), *((2, n) for n in range(5))]):
        store.carry_out(load)
    hold(store, reader, 0, [0, 1, 2, 3, 4, 5])
    hold(store, reader, 2, [0, 1, 2, 3, 4])
    store.lookup(0, i32(0, 1, 2, 3, 4, 5))
    assert (store.stats.misses, store.complete) == (1, True)
    assert store.rehome([(0, 1), (2, 0)]) == []
    hold(store, reader, 0, [1])
    hold(store, reader, 2, [0])
    store.lookup(0, i32(0, 3))  # guests again, one of which leaves for a home
    (load,) = store.rehome([(0, 1), (0, 0), (2, 0), (2, 1)])
    store.carry_out(load)
    hold(store, reader, 2, [0, 1])
