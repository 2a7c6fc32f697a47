import math

import pytest

from pregate.base.backoff import Backoff


def test_pauses_double_to_the_most():
    backoff = Backoff(1.0, 10.0)
    assert [backoff.failed(0) for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    assert [backoff.failed(0) for _ in range(2000)][-1] == 10


def test_the_first_may_be_free_and_the_number_bounded():
    backoff = Backoff(1.0, 60.0, num_free=1, most=3)
    assert [backoff.failed(0) for _ in range(5)] == [0, 1, 2, math.inf, math.inf]


@pytest.mark.parametrize(("ran_s", "then"), [(60.0, 1.0), (59.9, 4.0)])
def test_only_what_ran_steadily_begins_anew(ran_s, then):
    backoff = Backoff(1.0, 10.0, most=3)
    assert [backoff.failed(0), backoff.failed(1)] == [1, 2]
    backoff.runs(100.0)
    assert backoff.failed(100.0 + ran_s) == then


def test_time_in_which_it_did_not_run_is_not_steady():
    backoff = Backoff(1.0, 10.0)
    backoff.runs(0)
    assert [backoff.failed(1), backoff.failed(1000)] == [1, 2]
