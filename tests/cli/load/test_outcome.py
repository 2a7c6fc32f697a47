"""The figures of a load, by hand."""

import pytest

from pregate.cli.load.outcome import Outcome, figures


def test_times_throughput_and_goodput_by_hand():
    outcomes = [
        Outcome(0.0, 5, [0.1, 0.2, 0.3, 0.3], 0.3),  # gaps 0.1, 0.05, 0.05
        Outcome(1.0, 7, [3.0, 3.1], 3.1),  # a first token after 2 s
        Outcome(1.0, 7, [], 1.1, "RESOURCE_EXHAUSTED"),
        Outcome(1.5, 1, [2.0], 2.0),
    ]
    assert outcomes[0].gaps_s == pytest.approx([0.1, 0.05, 0.05])
    found = figures(outcomes, ttft_bound_s=1.0, itl_bound_s=0.07)
    assert found["requests"] == {"sent": 4, "answered": 3, "RESOURCE_EXHAUSTED": 1}
    assert found["seconds"] == 3.1
    assert found["time_to_first_token_ms"]["p50"] == 500
    assert found["end_to_end_ms"]["p50"] == 500
    assert found["inter_token_ms"]["mean"] == 75
    assert found["output_tokens_per_s"] == pytest.approx(7 / 3.1, abs=1e-3)
    assert found["good_share_of_sent"] == 0.5, "the second came too late, the refused one not at all"
    assert figures([Outcome(0, 1, [], 1, "UNAVAILABLE")], 1, 1)["time_to_first_token_ms"] == {}


def test_tokens_that_come_together_share_the_time_before_them():
    one = Outcome(0.0, 1, [0.5, 0.5, 0.8, 0.8, 0.8], 0.8)
    assert one.gaps_s == pytest.approx([0.0, 0.1, 0.1, 0.1])
