"""Traces and random arrivals: what is read, refused and clipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from pregate.base.errors import UserError
from pregate.cli.load.arrivals import Arrival, clipped, first_of, poisson, read_trace


def test_a_trace_is_replayed_from_its_first_arrival(tmp_path: Path):
    file = tmp_path / "trace.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens\n5.0,20,3\n3.0,10,0\n9.0,1,1\n")
    assert read_trace(file, speed=2.0) == [Arrival(0.0, 10, 1), Arrival(1.0, 20, 3), Arrival(3.0, 1, 1)]
    assert first_of(read_trace(file), 2, None) == [Arrival(0.0, 10, 1), Arrival(2.0, 20, 3)]
    assert len(first_of(read_trace(file), None, 2.5)) == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a,b\n1,2\n", "its first line must name the columns arrival_s, prompt_tokens, output_tokens"),
        ("arrival_s,prompt_tokens,output_tokens\n1,x,3\n", ":2: must be a time and two counts"),
        ("arrival_s,prompt_tokens,output_tokens\nnan,1,3\n", ":2: must be 0 or more"),
        ("arrival_s,prompt_tokens,output_tokens\n", "has no arrivals"),
    ],
)
def test_what_is_no_trace_is_refused(text: str, sentence: str, tmp_path: Path):
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_trace(file)


def test_random_arrivals_come_at_their_rate_and_the_same_for_a_seed():
    some = first_of(poisson(50.0, 7, 8, seed=3), 5000, None)
    assert some == first_of(poisson(50.0, 7, 8, seed=3), 5000, None)
    assert some[-1].arrival_s == pytest.approx(100, rel=0.1)
    assert (some[0].prompt_tokens, some[0].output_tokens) == (7, 8)


def test_lengths_are_clipped_to_their_bounds_and_the_context():
    given = [Arrival(0, 10, 10), Arrival(1, 900, 10), Arrival(2, 900, 900), Arrival(3, 300, 5)]
    found, num = clipped(given, 100, 200, None)
    assert [(a.prompt_tokens, a.output_tokens) for a in found] == [(10, 10), (90, 10), (50, 50), (95, 5)]
    assert num == 3
    assert clipped(given, None, None, None) == (given, 0)
