"""What a host holds of a checkpoint: which unit lies in which slot, what is read when, and what happens to bad ones."""

import shutil

import numpy as np
import pytest
import torch

from pregate.base.errors import CheckpointError, UserError
from pregate.kernels import expert_ffn
from pregate.model.checkpoint import CheckpointReader
from pregate.workers.host.store import UnitStore

#: One unit of tests/workers/conftest.py's checkpoint: 3 x 256 x 512 fp32 values.
UNIT_BYTES = 3 * 256 * 512 * 4
UNITS = [(2, 3), (0, 4), (0, 1), (2, 0), (0, 4)]


def i32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def make_store(reader: CheckpointReader, units=UNITS) -> UnitStore:
    ffn = expert_ffn.choose("loop", torch.device("cpu"), torch.float32, act=reader.hidden_act, widths={256, 512})
    return UnitStore(reader, units, ffn.layout)


def hold(store: UnitStore, reader: CheckpointReader, layer: int, experts: list[int]) -> None:
    """The slots of `layer` hold these experts in this order, with the checkpoint's weights."""
    weights = store.weights(layer)
    assert weights.num_slots == len(experts)
    for slot, expert in enumerate(experts):
        gate_up, down = reader.read_unit(layer, expert)
        assert torch.equal(weights.gate_up_SMD[slot], gate_up)
        assert torch.equal(weights.down_SDM[slot], down)


def test_units_lie_in_ascending_order_and_are_read_once(reader):
    store = make_store(reader)
    assert store.units() == [(0, 1), (0, 4), (2, 0), (2, 3)]
    hold(store, reader, 0, [1, 4])
    hold(store, reader, 2, [0, 3])
    assert store.slots(np.array([2, 0, 0, 2, 0]), i32(3, 1, 4, 0, 0)).tolist() == [1, 0, 1, 0, -1]
    assert (store.stats.num_units, store.stats.units_read, store.stats.misses) == (4, 4, 0)
    assert store.stats.read_bytes == store.stats.held_bytes == 4 * UNIT_BYTES


def test_a_unit_that_is_missing_is_read_then_and_kept(reader):
    store = make_store(reader)
    versions = store.versions.copy()
    for _ in range(2):
        slots, weights = store.lookup(0, i32(1, 2, 4, 5))
        assert slots.tolist() == [0, 1, 2, 3]
        assert weights is store.weights(0)
        hold(store, reader, 0, [1, 2, 4, 5])
        assert (store.stats.misses, store.stats.units_read, store.stats.num_units) == (2, 6, 6)
    assert (store.versions - versions).tolist() == [1, 0, 0], "the layer's slots moved once, others' did not"
    assert store.lookup(2, i32(3))[0].tolist() == [1]
    assert store.stats.misses == 2


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
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed after it was opened"):
        store.lookup(0, i32(1, 2))
    assert (store.stats.num_units, store.versions.tolist()) == (4, [1, 0, 1])
    assert store.lookup(0, i32(1, 4))[0].tolist() == [0, 1]
    hold(store, CheckpointReader(unit_checkpoint), 0, [1, 4])
