import pytest

from pregate.base.errors import QueueFullError, UserError
from pregate.router.doors.in_flight import InFlight


def test_ids_are_the_callers_and_the_number_is_bounded():
    in_flight = InFlight(2)
    with in_flight.take("a", "one", 1), in_flight.take("b", "one", 1):
        with pytest.raises(UserError, match="one: is running already"), in_flight.take("a", "one", 1):
            pass
        with pytest.raises(QueueFullError), in_flight.take("a", "two", 1):
            pass
    assert in_flight.num_requests == 0 and in_flight.idle.is_set()


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_an_aborted_one_and_its_successor_end_in_any_order(first_ends_first):
    """A stream that is resumed under its id may outlive the one that resumes it: its reader is slow."""
    in_flight = InFlight(2)
    first, second = in_flight.take("a", "one", 1), in_flight.take("a", "one", 1)
    first.__enter__().aborted = True
    taken = second.__enter__()
    assert in_flight.find("a", "one") is taken
    for one in (first, second) if first_ends_first else (second, first):
        one.__exit__(None, None, None)
    assert in_flight.find("a", "one") is None and in_flight.num_requests == 0
