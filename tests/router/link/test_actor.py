"""The engine's process ends without touching what its loop, still in a step, uses."""

import logging
import threading
from types import SimpleNamespace

import pytest

from pregate.router.engine.options import EngineOptions
from pregate.router.link import actor as module
from pregate.router.link.actor import EngineActor


class Client:
    closed = False

    def close(self):
        self.closed = True


@pytest.fixture
def actor(monkeypatch):
    """One that serves nothing. (An actor sets logging up for its process, which here is the tests'.)"""
    logger = logging.getLogger("pregate")
    before = logger.handlers, logger.level, logger.propagate
    monkeypatch.setattr(module.EngineActor, "stop_timeout_s", 0.05)
    yield EngineActor(EngineOptions("/m"), "inproc://e")
    logger.handlers, logger.level, logger.propagate = before


def test_hosts_are_left_only_when_the_loop_has_ended(actor):
    client, step = Client(), threading.Event()
    actor._engine = SimpleNamespace(exchange=SimpleNamespace(clients=[client]))
    actor._thread = threading.Thread(target=step.wait, daemon=True)
    actor._thread.start()
    actor.stop()
    assert not client.closed
    step.set()
    actor._thread.join(5)
    actor.stop()
    assert client.closed
