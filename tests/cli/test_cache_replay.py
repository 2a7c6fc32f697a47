"""The laboratory's replays: the optimum against brute force, and what a clock shows of fetching ahead."""

import functools
from itertools import combinations
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pregate.base.errors import UserError
from pregate.cli.cache.command import CacheOptions
from pregate.cli.cache.policies import POLICIES
from pregate.cli.cache.recording import Recording
from pregate.cli.cache.replay import count_hits, time_stalls

STEPS = Path("steps.npz")


def recording(used: np.ndarray, horizon: int = 0) -> Recording:
    """Steps whose next `horizon` ones are all known."""
    num_steps = len(used)
    known = np.zeros((num_steps, horizon, *used.shape[1:]), dtype=bool)
    for step in range(num_steps):
        ahead = used[step + 1 : step + 1 + horizon]
        known[step, : len(ahead)] = ahead
    return Recording(used, known, np.zeros_like(used, dtype=np.uint8), np.ones(num_steps, dtype=np.int64), np.array(8))


@st.composite
def steps(draw, most_steps=5, layers=(1, 2), routed=(2, 4)):
    shape = (draw(st.integers(1, most_steps)), draw(st.integers(*layers)), draw(st.integers(*routed)))
    bits = draw(st.lists(st.booleans(), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    return np.array(bits).reshape(shape)


def fewest_loads(used: np.ndarray, num_held: int) -> int:
    """Every choice of what stays after every layer, tried."""
    layers = [frozenset((n, int(e)) for e in np.flatnonzero(row)) for step in used for n, row in enumerate(step)]
    layers = [units for units in layers if units]

    @functools.cache
    def loads(place: int, held: frozenset) -> int:
        if place == len(layers):
            return 0
        now = held | layers[place]
        stay = min(num_held, len(now))
        rest = min(loads(place + 1, frozenset(kept)) for kept in combinations(sorted(now), stay))
        return len(layers[place] - held) + rest

    return loads(0, frozenset())


@settings(max_examples=60, deadline=None)
@given(steps(), st.integers(0, 4))
def test_optimal_loads_as_few_units_as_any_choice_could(used, num_held):
    held = recording(used)
    assert count_hits(held, POLICIES["optimal"](held, 0), num_held).loads == fewest_loads(used, num_held)


@settings(max_examples=40, deadline=None)
@given(steps(most_steps=12, routed=(2, 6)), st.integers(0, 8), st.integers(0, 9))
def test_no_policy_beats_the_optimum_and_whoever_knows_all_reaches_it(used, num_held, seed):
    held = recording(used, horizon=len(used))
    found = {name: count_hits(held, make(held, seed), num_held) for name, make in POLICIES.items()}
    assert {counts.uses for counts in found.values()} == {int(used.sum())}
    assert all(counts.loads >= found["optimal"].loads for counts in found.values())
    assert found["lookahead"].loads == found["optimal"].loads
    everything = count_hits(held, POLICIES["lru"](held, seed), used[0].size)
    assert everything.loads == int(used.any(axis=0).sum()), "each unit once"


def test_lru_falls_to_no_hits_where_layers_take_turns():
    """Ten steps of four layers of one unit each, two held."""
    held = recording(np.ones((10, 4, 1), dtype=bool), horizon=2)
    hits = {name: count_hits(held, make(held, 0), 2).hits for name, make in POLICIES.items()}
    assert hits["lru"] == 0
    assert hits["lookahead"] == hits["optimal"] == hits["known step"] == 9 * 2
    assert hits["hot set"] == 9 * 2


@settings(max_examples=30, deadline=None)
@given(steps(most_steps=10, layers=(2, 4), routed=(2, 4)), st.integers(0, 8), st.sampled_from([0.1, 1.0, 4.0]))
def test_fetching_ahead_of_known_steps_wastes_nothing_and_waits_no_longer_than_the_loads_take(used, extra, load_s):
    held = recording(used, horizon=len(used))
    slots = int(used.sum(axis=2).max()) + extra
    timing = time_stalls(held, POLICIES["lookahead"](held, 0), slots, load_s=load_s, layer_s=1.0, lead=2)
    assert timing.wasted == 0
    assert timing.stall_s <= timing.loads * load_s + 1e-9
    demand = time_stalls(held, POLICIES["lru"](held, 0), slots, load_s=load_s, layer_s=1.0, lead=0)
    assert demand.stall_s == pytest.approx(demand.loads * load_s)


def test_a_load_as_long_as_a_layer_is_hidden_but_for_the_first():
    """Four layers of one unit, three slots: while a layer runs, the unit of the next is loaded."""
    held = recording(np.ones((6, 4, 1), dtype=bool), horizon=6)
    timing = time_stalls(held, POLICIES["lookahead"](held, 0), 3, load_s=1.0, layer_s=1.0, lead=1)
    assert timing.stall_s == 1.0
    assert timing.compute_s == 24.0


def test_a_recording_is_read_as_it_was_written(tmp_path):
    used = np.random.default_rng(0).random((5, 3, 7)) < 0.4
    written = recording(used, horizon=2)
    written.save(tmp_path / "steps.npz")
    read = Recording.load(tmp_path / "steps.npz")
    for name in ("used_SLR", "known_SHLR", "likely_SLR", "tokens_S"):
        assert np.array_equal(getattr(read, name), getattr(written, name))
    (tmp_path / "other").write_text("no")
    with pytest.raises(UserError, match="is not a recording of steps"):
        Recording.load(tmp_path / "other")


@pytest.mark.parametrize("resident", ["nan", "inf", "0.5,inf", "-1", "2.5", "0", "many"])
def test_a_capacity_is_a_count_or_a_share(resident):
    with pytest.raises(UserError, match=rf"resident {resident}: allowed: counts, and shares below 1"):
        CacheOptions(recording=STEPS, resident=resident)


def test_capacities_are_of_the_units_used():
    assert CacheOptions(recording=STEPS, resident="0.001,0.25,3,12").held(12) == [1, 3, 3, 12]
    with pytest.raises(UserError, match=r"resident 4,1e30: allowed: counts up to 12"):
        CacheOptions(recording=STEPS, resident="4,1e30").held(12)


def test_bandwidth_is_a_size():
    size, none = cast("float", "1GB"), cast("float", "fast")
    assert CacheOptions(recording=STEPS, bandwidth=size).bandwidth == 1e9
    with pytest.raises(UserError, match=r"bandwidth fast: allowed: .*above 0, also as 16GB"):
        CacheOptions(recording=STEPS, bandwidth=none)
