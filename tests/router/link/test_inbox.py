"""The queue between the link's I/O thread and the compute thread: its bounds, and what leaves it."""

import pytest

from pregate.base.errors import QueueFullError
from pregate.router.link.inbox import Inbox, Pending
from pregate.router.link.messages import SamplingParams, SubmitRequest

SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


def test_an_inbox_is_bounded_in_bytes_and_gives_back_what_leaves_it():
    def pending(name, num_tokens=10, num_bytes=40):
        return Pending(SubmitRequest(name, (1,) * num_tokens, SHORT), num_bytes, 0.0)

    inbox = Inbox(max_requests=10, max_bytes=100)
    inbox.put(pending("a"))
    inbox.put(pending("b"))
    with pytest.raises(QueueFullError, match="2 requests of 80 bytes"):
        inbox.put(pending("c"))
    inbox.cancel("a")
    inbox.put(pending("c", num_tokens=30))
    inbox.cancel("unknown")
    cancels, taken = inbox.take(max_tokens=15)
    assert cancels == ["unknown"] and [p.request.request_id for p in taken] == ["b"]
    cancels, taken = inbox.take(max_tokens=15)
    assert cancels == [] and [p.request.request_id for p in taken] == ["c"], "one is taken in any case"
    inbox.wait(0.01)
    assert len(inbox) == 0
