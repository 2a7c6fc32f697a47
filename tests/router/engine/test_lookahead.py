"""What is expected of the steps to come, on sequences made by hand."""

import numpy as np

from pregate.model.config import LayerCut
from pregate.model.packed_paths import PackedPaths
from pregate.model.paths import Paths
from pregate.router.engine.batching import UnitLayout
from pregate.router.engine.lookahead import Lookahead, used_units
from pregate.router.engine.sequence import Sequence
from pregate.router.link.messages import SamplingParams
from pregate.workers.link.protocol import SURE

#: Two layers of nine experts.
CUTS = [LayerCut(9, 0, 1, 8)] * 2


def sequence(experts: list[int], num_computed: int = 0) -> Sequence:
    """Token n visits expert `experts[n]` in layer 0 and the one after it in layer 1."""
    ids = np.array([[[e], [e + 1]] for e in experts], dtype=np.int16)
    made = Sequence(str(experts), experts, len(experts), 9, SamplingParams(9), 0, None, np.zeros(1))
    made.num_computed, made.paths = num_computed, PackedPaths.of(Paths(ids))
    return made


def experts_of(used_LR: np.ndarray) -> list[int]:
    """Experts of layer 0, after looking that layer 1 has those after them."""
    assert np.array_equal(used_LR[0, :-1], used_LR[1, 1:])
    return np.flatnonzero(used_LR[0]).tolist()


def test_used_units_are_those_of_all_tokens_and_padding_is_none():
    assert used_units(np.array([[[0, 2], [1, -1]]]), 3).tolist() == [[True, False, True], [False, True, False]]
    assert not used_units(np.zeros((0, 2, 1), dtype=np.int16), 3).any()


def test_prompts_fill_the_steps_in_order_and_what_comes_after_them_is_forecast():
    """Steps of four tokens. One request decodes, one is half computed, two wait."""
    decoding, half = sequence([0, 1, 5], num_computed=2), sequence([2, 2, 3, 3, 4], num_computed=1)
    waiting = [sequence([6, 6, 6, 7]), sequence([1])]
    ahead = Lookahead(CUTS, step_tokens=4, horizon=4).expect(8, [decoding, half], waiting, {decoding: 1, half: 3})
    assert ahead.step == 8
    # Step 8: one decode token, the last token of the half computed one, two of the first that waits. Step 9: two
    # decode tokens and its other two. Step 10: three decode tokens and the last that waits.
    assert [experts_of(known) for known in ahead.known_HLR] == [[4, 6], [6, 7], [1], []]
    assert experts_of(ahead.likely_LR > 0) == [0, 1, 2, 3, 4, 5, 6, 7], "what those asked for that will decode"
    assert ahead.likely_LR[0, 6] > ahead.likely_LR[0, 0] > 0, "three tokens of a request ask for more than one"
    ahead.check(2, 9)


def test_a_queue_is_expected_before_anything_runs():
    ahead = Lookahead(CUTS, step_tokens=3, horizon=2).expect(1, [], [sequence([1, 2, 3, 4]), sequence([5])], {})
    assert [experts_of(known) for known in ahead.known_HLR] == [[1, 2, 3], [4, 5]]


def test_more_decode_tokens_than_a_step_takes_leave_no_room_for_prompts():
    running = [sequence([n], num_computed=1) for n in range(3)]
    ahead = Lookahead(CUTS, step_tokens=2, horizon=2).expect(1, running, [sequence([7])], {})
    assert not ahead.known_HLR.any()
    assert experts_of(ahead.likely_LR > 0) == [0, 1, 2]


def test_of_steps_chosen_by_path_units_are_expected_as_they_are_asked_for():
    """Of texts that were left out two ask for expert 3 and one for 5, a prompt's next piece once for 1 and thrice for
    6, which makes one who asks; what one that runs now asks for next is a guess."""
    layout = UnitLayout(np.zeros((2, 9), dtype=int), [1, 1], 1)
    left = [sequence([0, expert], num_computed=1) for expert in (3, 5, 3)]
    runs, prompt = sequence([7, 7], num_computed=1), sequence([0, 6, 1, 6, 6, 2])
    ahead = Lookahead(CUTS, step_tokens=4).demand(8, [*left, prompt, runs], {runs: 1, prompt: 1}, layout)
    assert ahead.step == 8
    assert not ahead.known_HLR.any()
    likely_R = ahead.likely_LR[0]
    assert likely_R.tolist() == [*ahead.likely_LR[1, 1:], 0], "one index, one order in all layers"
    assert SURE > likely_R[3] > likely_R[5] == likely_R[1] == likely_R[6] > 0
    assert likely_R[7] > likely_R[[0, 2, 4, 8]].max(), "it may go on as before"
    assert likely_R[7] < likely_R[5]
    ahead.check(2, 9)


def test_what_most_ask_for_is_likeliest_however_many_they_are():
    rng, layout = np.random.default_rng(0), UnitLayout(np.zeros((2, 9), dtype=int), [1, 1], 1)
    for num in (1, 3, 30, 300):
        left = [sequence([0, int(expert)], num_computed=1) for expert in rng.integers(0, 3, num)]
        runs = [sequence([int(expert)] * 3, num_computed=2) for expert in rng.integers(0, 8, 7)]
        hot = [sequence([0, 6], num_computed=1) for _ in range(num + 8)]
        ahead = Lookahead(CUTS, step_tokens=4).demand(1, [*left, *runs, *hot], dict.fromkeys(runs, 1), layout)
        assert ahead.likely_LR.argmax(axis=1).tolist() == [6, 7]


def test_a_request_that_comes_changes_what_is_known_and_makes_no_forecast():
    lookahead, running = Lookahead(CUTS, step_tokens=4, horizon=2), sequence([0, 1, 5], num_computed=2)
    before = lookahead.expect(1, [running], [], {running: 1})
    assert experts_of(before.likely_LR > 0) == [0, 1, 5]
    running.token_ids.append(8)  # its path is not known yet, and is not asked for
    ahead = lookahead.expect(1, [running], [sequence([7])], {running: 2}, forecast=False)
    assert [experts_of(known) for known in ahead.known_HLR] == [[7], []]
    assert np.array_equal(ahead.likely_LR, before.likely_LR)
