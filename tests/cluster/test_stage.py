import threading

import pytest

from pregate.cluster import stage


def test_a_long_stage_is_said_again_and_a_failed_one_no_more(monkeypatch):
    monkeypatch.setattr(stage, "SAY_EVERY_S", 0.01)
    said, twice = [], threading.Event()

    def say(text):
        said.append(text)
        if len(said) == 3:
            twice.set()

    def fails():
        assert twice.wait(20)
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"), stage.stage(say, "checking the model"):
        fails()
    assert said[:3] == ["checking the model", *["checking the model (after 0 s)"] * 2]
    number = len(said)
    assert not any(thread.name == "pregate-stage" for thread in threading.enumerate())
    assert len(said) == number
