"""Next uses from plans and expectations, and the rules of fetching and evicting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pregate.workers.host.next_use import FAR, NextUse, Outlook, Uses
from pregate.workers.link.expected import SURE, Expected


def mask(*units: tuple[int, int]) -> np.ndarray:
    """Two layers of three experts."""
    found = np.zeros((2, 3), dtype=bool)
    for unit in units:
        found[unit] = True
    return found


def likely(*units: tuple[int, int]) -> np.ndarray:
    return SURE * mask(*units).astype(np.uint8)


def test_times_are_layers_from_now_and_pass_as_layers_are_reached():
    uses = NextUse(2, 3)
    uses.plan(5, mask((0, 1), (1, 2)))
    uses.expect(Expected(6, np.stack([mask((0, 0)), mask((0, 1))]), likely((1, 0))))
    # Now is 10, layer 0 of step 5; step 6 begins at 12, step 7 at 14.
    times = uses.times()
    assert times.known_LR.tolist() == [[2, 0, FAR - 10], [FAR - 10, FAR - 10, 1]]
    assert times.turn_L.tolist() == [2, 3], "of step 6, of which not all is known"
    uses.done(5, 0, np.array([1]))
    assert uses.times().known_LR[0].tolist() == [2, 4, FAR - 10], "expert 1 was used, and is used next in step 7"
    uses.reach(5, 1)
    assert uses.times().known_LR[1, 2] == 0
    uses.reach(6, 0)
    assert uses.times().known_LR.tolist() == [[0, 2, FAR - 12], [FAR - 12] * 3], "what was planned and not done is past"


def test_a_plan_takes_the_place_of_what_was_expected_of_its_step():
    uses = NextUse(2, 3)
    uses.expect(Expected(6, np.stack([mask((0, 0), (1, 1)), mask((0, 1))]), likely((0, 2))))
    assert uses.times().known_LR[1, 1] < FAR // 2
    uses.plan(6, mask((0, 2)))
    assert [unit for unit in np.ndindex(2, 3) if uses.times().known_LR[unit] < FAR // 2] == [(0, 1), (0, 2)]
    uses.done(6, 0, np.array([2]))
    assert uses.times().turn_L.tolist() == [2, 3]


def test_a_plan_is_over_where_steps_after_the_next_are_expected():
    uses, nothing = NextUse(2, 3), np.zeros((0, 2, 3), dtype=bool)
    uses.plan(5, mask((0, 1), (1, 2)))
    uses.expect(Expected(6, nothing, likely()))
    assert (uses.times().known_LR < FAR // 2).sum() == 2
    uses.expect(Expected(7, nothing, likely()))
    assert not (uses.times().known_LR < FAR // 2).any()


def test_what_is_done_of_an_expected_step_is_expected_no_more():
    uses, known = NextUse(2, 3), np.stack([mask((0, 0), (1, 1))])
    uses.expect(Expected(1, known, likely()))
    uses.done(1, 0, np.array([0]))
    assert uses.times().known_LR[0, 0] > FAR // 2
    assert uses.times().known_LR[1, 1] == 1
    assert known[0, 0, 0], "what others hold is not written to"


def test_several_engines_share_a_host_and_the_nearest_use_counts():
    uses = Uses(2, 3)
    uses.of("a").plan(5, mask((1, 0)))
    uses.of("b").plan(700, mask((0, 0), (1, 0)))
    uses.of("b").reach(700, 1)
    assert uses.look().known_LR[1, 0] == 0
    uses.forget("b")
    assert uses.look().known_LR[1, 0] == 1


def test_of_units_without_a_known_use_the_longest_unused_is_farthest():
    uses = Uses(2, 3)
    uses.used(0, np.array([0, 1]))
    uses.used(1, np.array([2]))
    uses.used(0, np.array([0]))
    assert uses.look().farthest(mask((0, 0), (0, 1), (1, 2))) == (0, 1)
    uses.of("a").plan(0, mask((0, 1)))
    assert uses.look().farthest(mask((0, 0), (0, 1), (1, 2))) != (0, 1)
    assert uses.look().farthest(mask()) is None


def test_without_plans_a_layer_runs_next_in_its_turn():
    uses = NextUse(2, 3)
    uses.reach(7, 1)
    assert uses.times().turn_L.tolist() == [1, 0]
    uses.reach(8, 0)
    assert uses.times().turn_L.tolist() == [0, 1]


def outlook(known: list[list[int]]) -> Outlook:
    return Outlook(np.array(known), np.array(known))


def test_units_of_which_no_use_is_known_lie_where_they_are_used_on_average():
    """Ten steps: expert 0 in all of them, 1 in every second, 2 in none; then it is likely to be."""
    uses = Uses(1, 3)
    for step in range(10):
        uses.of("a").plan(step, np.array([[True, step % 2 == 0, False]]))
        experts = np.array([0, 1] if step % 2 == 0 else [0])
        uses.of("a").done(step, 0, experts)
        uses.used(0, experts)
    first, second, third = uses.look().distance_LR[0].tolist()
    assert 1 <= first < second < third
    uses.of("a").expect(Expected(10, np.zeros((0, 1, 3), dtype=bool), np.array([[0, 0, SURE]], dtype=np.uint8)))
    assert uses.look().distance_LR[0, 2] < third
    uses.of("a").expect(Expected(10, np.array([[[False, True, False]]]), np.zeros((1, 3), dtype=np.uint8)))
    first, second, _ = uses.look().distance_LR[0].tolist()
    assert second == 1, "known"
    assert first > FAR // 4, "nothing runs, and the prompts that wait do not use it"


def test_the_nearest_missing_unit_takes_the_place_of_the_farthest():
    look = outlook([[1, 2, 9], [3, FAR, 7]])
    held = mask((0, 0), (0, 2), (1, 1))
    assert look.fetch(~held, held, 0, lead=2) == ((0, 1), (1, 1))
    assert look.fetch(~held, held, 1, lead=2) == ((0, 1), None)
    assert look.fetch(~held, held, 0, lead=1) is None, "what is missing is needed only after two layers"
    assert look.fetch(~held, mask((0, 0)), 0, lead=9) is None, "the only one that may go is needed sooner"


@settings(deadline=None)
@given(st.data())
def test_nothing_leaves_for_a_unit_that_is_needed_later(data):
    times = st.integers(1, 12) | st.just(FAR)
    known = np.array(data.draw(st.lists(times, min_size=6, max_size=6))).reshape(2, 3)
    held = np.array(data.draw(st.lists(st.booleans(), min_size=6, max_size=6))).reshape(2, 3)
    lead, num_free = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 1))
    look = outlook(known.tolist())
    chosen = look.fetch(~held, held, num_free, lead)
    if chosen is None:
        near = ~held & (known <= lead)
        assert not near.any() or (not num_free and known[held].max(initial=0) <= known[near].min())
        return
    unit, leaving = chosen
    assert not held[unit] and known[unit] == known[~held].min() <= lead
    if num_free:
        assert leaving is None
    else:
        assert held[leaving] and look.distance_LR[leaving] > known[unit]


@pytest.mark.parametrize("known", [np.zeros((1, 2, 4), dtype=bool), np.zeros((1, 2, 3), dtype=np.int32)])
def test_expectations_of_another_model_are_refused(known):
    with pytest.raises(ValueError, match="expected units"):
        Expected(0, known, likely()).check(2, 3)
