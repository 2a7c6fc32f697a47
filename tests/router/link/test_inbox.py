"""The queue between the link's I/O thread and the compute thread: its bounds, and what leaves it."""

import pytest

from pregate.base.errors import QueueFullError
from pregate.router.link.inbox import Inbox, Pending
from pregate.router.link.messages import SamplingParams, SubmitRequest

SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


def pending(name, num_tokens):
    return Pending(SubmitRequest(name, (1,) * num_tokens, SHORT), 0.0)


def test_an_inbox_is_bounded_in_bytes_and_gives_back_what_leaves_it():
    inbox = Inbox(max_requests=10, max_bytes=250)
    inbox.put(pending("a", 10))
    inbox.put(pending("b", 10))
    with pytest.raises(QueueFullError, match="2 requests of 160 bytes"):
        inbox.put(pending("c", 15))
    inbox.cancel("a")
    inbox.put(pending("c", 20))
    inbox.cancel("unknown")
    cancels, taken = inbox.take(max_tokens=15)
    assert cancels == ["unknown"] and [p.request.request_id for p in taken] == ["b"]
    cancels, taken = inbox.take(max_tokens=15)
    assert cancels == [] and [p.request.request_id for p in taken] == ["c"], "one is taken in any case"
    inbox.wait(0.01)
    assert len(inbox) == 0


def test_one_that_is_larger_than_the_bound_is_not_refused_for_ever():
    """It was, with "0 requests of 0 bytes wait, as many as may; try again later"."""
    inbox = Inbox(max_requests=10, max_bytes=100, name="path service")
    inbox.put(pending("a", 50))
    with pytest.raises(QueueFullError, match="1 requests of 400 bytes wait for the path service"):
        inbox.put(pending("b", 1))
