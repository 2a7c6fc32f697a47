"""The pool of slots under any sequence of puts, evictions and growth: nothing lost, nothing owned twice."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pregate.kernels.cpu.packed import PackedFFN
from pregate.kernels.weights import PaddedLayout, PlainLayout
from pregate.workers.host.slots import SlotMap, SlotPool, Unit

LAYERS, UNITS, WIDTH, HIDDEN = 3, 5, 2, 3
CPU = torch.device("cpu")


def unit_of(layer: int, unit: int, number: int) -> Unit:
    """Weights that no other unit has, and no other time it was put."""
    value = float(1000 * layer + 100 * unit + number)
    return torch.full((2 * WIDTH, HIDDEN), value), torch.full((HIDDEN, WIDTH), -value)


class PoolMachine(RuleBasedStateMachine):
    """Against a dict of what should be held."""

    def __init__(self) -> None:
        super().__init__()
        self.map = SlotMap.empty(LAYERS, UNITS)
        self.pool = SlotPool(PlainLayout(torch.float32, CPU), WIDTH, HIDDEN, 4, self.map)
        self.held: dict[tuple[int, int], Unit] = {}
        self.number = 0

    @precondition(lambda self: self.pool.num_free)
    @rule(layer=st.integers(0, LAYERS - 1), unit=st.integers(0, UNITS - 1))
    def put(self, layer: int, unit: int) -> None:
        self.number += 1
        if (layer, unit) in self.held:
            with pytest.raises(AssertionError, match="is held already"):
                self.pool.put(layer, unit, unit_of(layer, unit, self.number))
            return
        before = self.map.versions.copy()
        self.held[layer, unit] = unit_of(layer, unit, self.number)
        self.pool.put(layer, unit, self.held[layer, unit])
        assert (self.map.versions - before).tolist() == [int(n == layer) for n in range(LAYERS)]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        layer, unit = data.draw(st.sampled_from(sorted(self.held)))
        version = self.map.versions[layer]
        self.pool.evict(layer, unit)
        del self.held[layer, unit]
        assert self.map.versions[layer] > version

    @precondition(lambda self: self.pool.weights.num_slots < LAYERS * UNITS)
    @rule(num_slots=st.integers(1, 3))
    def grow(self, num_slots: int) -> None:
        before = self.pool.num_free
        self.pool.grow(num_slots)
        assert self.pool.num_free == before + num_slots

    @invariant()
    def map_and_contents_are_right(self) -> None:
        self.pool.check()
        assert {(int(n), int(u)) for n, u in np.argwhere(self.map.slots >= 0)} == set(self.held)
        assert self.pool.num_free + len(self.held) == self.pool.weights.num_slots
        for (layer, unit), (gate_up, down) in self.held.items():
            slot = int(self.map.slots[layer, unit])
            assert torch.equal(self.pool.weights.gate_up_SMD[slot], gate_up)
            assert torch.equal(self.pool.weights.down_SDM[slot], down)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, database=None, derandomize=True)


def test_units_put_one_after_another_lie_side_by_side():
    slot_map = SlotMap.empty(LAYERS, UNITS)
    pool = SlotPool(PaddedLayout(torch.float32, CPU), WIDTH, HIDDEN, LAYERS * UNITS, slot_map)
    for layer, unit in np.ndindex(LAYERS, UNITS):
        pool.put(layer, unit, unit_of(layer, unit, 0))
    assert slot_map.slots.tolist() == np.arange(LAYERS * UNITS).reshape(LAYERS, UNITS).tolist()


def test_packed_units_keep_theirs_when_the_pool_grows():
    slot_map = SlotMap.empty(1, 2)
    pool = SlotPool(PackedFFN("silu").layout, WIDTH, HIDDEN, 1, slot_map)
    pool.put(0, 1, unit_of(0, 1, 7))
    pool.grow(1)
    pool.put(0, 0, unit_of(0, 0, 9))
    pool.check()
    found = pool.weights.gate_up[slot_map.slots[0, 1]](torch.eye(HIDDEN))
    assert torch.equal(found.t(), unit_of(0, 1, 7)[0])


@pytest.mark.parametrize("damage", ["owner", "free", "map"])
def test_the_checker_notices_damage(damage):
    slot_map = SlotMap.empty(LAYERS, UNITS)
    pool = SlotPool(PlainLayout(torch.float32, CPU), WIDTH, HIDDEN, 3, slot_map)
    pool.put(0, 1, unit_of(0, 1, 0))
    if damage == "owner":
        pool._owner.clear()
    elif damage == "free":
        pool._free.append(0)
    else:
        slot_map.slots[0, 1] = 2
    with pytest.raises(AssertionError):
        pool.check()
