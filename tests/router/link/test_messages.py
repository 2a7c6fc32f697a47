"""The sentences that every entrance prints for bad sampling values and prompts."""

from dataclasses import replace

import pytest

from pregate.base.errors import UserError
from pregate.base.sampling import MAX_SEED
from pregate.router.link.messages import SamplingParams, check_prompt

GOOD = SamplingParams(max_tokens=1)


@pytest.mark.parametrize(
    "given",
    [
        GOOD,
        replace(GOOD, temperature=0.0, top_p=1.0, seed=0),
        replace(GOOD, temperature=2.5, top_p=1e-9, seed=MAX_SEED, max_tokens=1 << 40),
    ],
)
def test_allowed_values_pass(given):
    given.validate(10)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens 0: must be at least 1"),
        ({"max_tokens": -5}, "max_tokens -5: must be at least 1"),
        ({"temperature": -0.1}, "temperature -0.1: must be 0 (greedy) to 100"),
        ({"temperature": float("nan")}, "temperature nan: must be 0 (greedy) to 100"),
        ({"temperature": 1e39}, "temperature 1e+39: must be 0 (greedy) to 100"),
        ({"repetition_penalty": 1e300}, "repetition_penalty 1e+300: must be 0.01 to 100"),
        ({"repetition_penalty": 1e-50}, "repetition_penalty 1e-50: must be 0.01 to 100"),
        ({"top_p": 0.0}, "top_p 0.0: must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p 1.1: must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p nan: must be above 0 and at most 1"),
        ({"seed": -1}, f"seed -1: must be 0 to {MAX_SEED}"),
    ],
)
def test_values_out_of_range_name_option_value_and_range(change, sentence):
    with pytest.raises(UserError) as error:
        replace(GOOD, **change).validate(10)
    assert str(error.value) == sentence


def test_prompt_must_leave_room_for_one_token():
    check_prompt([0, 9] * 3 + [1], vocab_size=10, max_context=8)
    with pytest.raises(UserError) as error:
        check_prompt([1] * 8, vocab_size=10, max_context=8)
    assert str(error.value) == "prompt of 8 tokens: longer than the context of 8 tokens allows; allowed: 1 to 7 tokens"


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([], "prompt of 0 tokens: must hold 1 to 7 tokens"),
        ([0, 10], "prompt token id 10: must be 0 to 9"),
        ([-1], "prompt token id -1: must be 0 to 9"),
    ],
)
def test_prompt_ids_must_exist(ids, sentence):
    with pytest.raises(UserError) as error:
        check_prompt(ids, vocab_size=10, max_context=8)
    assert str(error.value) == sentence
