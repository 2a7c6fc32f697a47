"""Sums over processes of which some end or start anew never fall."""

from pregate.router.link.tally import Tally


def test_what_a_process_had_counted_stays_when_it_is_gone_or_starts_anew():
    tally = Tally()
    tally.take(0, {"steps": 10, (1, "rows"): 4})
    tally.take(1, {"steps": 5})
    assert (tally["steps"], tally[1, "rows"], tally["other"]) == (15, 4, 0)
    tally.take(1, {"steps": 7})  # of 0 nothing is heard
    assert tally["steps"] == 17
    tally.take(0, {"steps": 2, (1, "rows"): 6})  # it is another process
    assert (tally["steps"], tally[1, "rows"]) == (19, 6)
    tally.take(0, {"steps": 1})
    assert tally["steps"] == 20
