"""An engine's server without expert hosts: requests wait, and patience ends."""

import threading

from pregate.base.errors import HostLostError
from pregate.router.link.messages import (
    FailedEvent,
    FinishedEvent,
    Heartbeat,
    InfoReply,
    InfoRequest,
    SamplingParams,
    SubmitRequest,
    TokensEvent,
)
from tests.router.running import PROMPT, QUICK, RawDoor, engine_thread, wait_for

LONG = SamplingParams(max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


def test_without_hosts_requests_wait_and_fail_when_patience_ends(engine, endpoint, monkeypatch):
    away, forward, poll = threading.Event(), engine.runner.run, engine.exchange.poll

    def or_lost(call):
        def checked(*arguments):
            if away.is_set():
                raise HostLostError(1, "silent for 3.0 s")
            return call(*arguments)

        return checked

    monkeypatch.setattr(engine.runner, "run", or_lost(forward))
    monkeypatch.setattr(engine.exchange, "poll", or_lost(poll))
    with engine_thread(engine, endpoint, QUICK), RawDoor(endpoint) as door:
        door.send(SubmitRequest("a", PROMPT, LONG))
        door.receive(TokensEvent)
        away.set()
        wait_for(lambda: door.receive(Heartbeat).unavailable, what="an engine that refuses")
        away.clear()
        door.receive(TokensEvent)
        away.set()
        failed = door.receive(FailedEvent)
        assert (failed.request_id, failed.code) == ("a", "UNAVAILABLE")
        assert failed.message == "expert host 1 is lost: silent for 3.0 s"
        door.send(SubmitRequest("b", PROMPT, SHORT), InfoRequest("i"))
        assert door.receive(FailedEvent).message == failed.message
        assert door.receive(InfoReply).info["unavailable"] == failed.message
        away.clear()
        wait_for(lambda: door.receive(Heartbeat).unavailable is None, what="an engine that takes requests again")
        door.send(SubmitRequest("c", PROMPT, SHORT))
        assert door.receive(FinishedEvent).request_id == "c"


def test_a_step_that_never_ends_for_want_of_hosts_fails_its_requests(engine, endpoint, monkeypatch):
    """Hosts answer between the steps, and die of each: patience adds up."""

    def lost(*_arguments):
        raise HostLostError(1, "it died of these rows")

    monkeypatch.setattr(engine.runner, "run", lost)
    with engine_thread(engine, endpoint, QUICK), RawDoor(endpoint) as door:
        door.send(SubmitRequest("a", PROMPT, LONG))
        failed = door.receive(FailedEvent)
        assert (failed.request_id, failed.code) == ("a", "UNAVAILABLE")
        assert "it died of these rows" in failed.message
