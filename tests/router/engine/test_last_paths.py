"""Where the tokens of the requests that ended last went: their paths, bounded, and nothing of what they say."""

import numpy as np
import pytest

from pregate.router.engine import last_paths
from pregate.router.link.messages import SamplingParams, SubmitRequest, TokensEvent
from tests.router.serving import engine_of, hosts_here


@pytest.fixture
def engine(tiny_path_checkpoint):
    with engine_of(tiny_path_checkpoint, hosts_here(tiny_path_checkpoint, 1)) as engine:
        yield engine


def run(engine, prompt: tuple[int, ...], num_tokens: int, salt: str = "") -> tuple[int, ...]:
    """Returns the prompt and what came of it."""
    sampling, ids = SamplingParams(num_tokens, ignore_eos=True), list(prompt)
    engine.submit(SubmitRequest(f"{len(prompt)}-{salt}", prompt, sampling, cache_salt=salt))
    while engine.has_work:
        ids += [i for event in engine.step() if isinstance(event, TokensEvent) for i in event.token_ids]
    return tuple(ids)


def ids_of(told) -> np.ndarray:
    return np.frombuffer(told["ids"], "<i2").reshape(told["shape"])


def test_the_last_tokens_of_the_last_requests_are_told_oldest_first(engine):
    assert engine.info()["last_paths"] == []
    texts = [run(engine, (1, *range(20, 24 + 9 * n)), 6, f"salt {n}") for n in range(6)]
    told = engine.info()["last_paths"]
    assert [request["salt"] for request in told] == [f"salt {n}" for n in range(6)][-last_paths.NUM_REQUESTS :]
    for request, text in zip(told, texts[-last_paths.NUM_REQUESTS :], strict=True):
        assert (request["prompt_tokens"], request["completion_tokens"]) == (len(text) - 6, 6)
        first = max(0, len(text) - 1 - last_paths.NUM_TOKENS)  # the last token went nowhere
        assert request["first"] == first
        assert np.array_equal(ids_of(request), engine.route(text[:-1]).ids[first:])
        assert request["ended_s"] > 0
    assert {request["first"] > 0 for request in told} == {True, False}


def test_what_a_request_says_is_not_told(engine):
    run(engine, (1, 21, 22), 4)
    (told,) = engine.info()["last_paths"]
    known = {"ids", "shape", "first", "prompt_tokens", "completion_tokens", "salt", "ended_s"}
    assert set(told) == known, "no text, no token ids, no names that a caller chose"


def test_of_wide_paths_fewer_tokens_are_kept(engine, monkeypatch):
    text = run(engine, (1, *range(20, 50)), 6)
    row = ids_of(engine.info()["last_paths"][0])[0].nbytes
    monkeypatch.setattr(last_paths, "_MOST_BYTES", 5 * row + 1)
    run(engine, (1, *range(20, 50)), 6)
    told = engine.info()["last_paths"][-1]
    assert (len(told["ids"]), told["first"]) == (5 * row, len(text) - 1 - 5)
    assert np.array_equal(ids_of(told), engine.route(text[:-1]).ids[-5:])
    monkeypatch.setattr(last_paths, "_MOST_BYTES", 1)
    run(engine, (1, *range(20, 50)), 6)
    assert engine.info()["last_paths"][-1]["shape"][0] == 1


def test_a_request_that_never_ran_is_passed_over_and_one_that_was_cancelled_is_not(engine):
    for name in ("waits", "runs"):
        engine.submit(SubmitRequest(name, (1, 30, 31), SamplingParams(8, ignore_eos=True)))
        if name == "runs":
            engine.step()
        engine.cancel(name)
    assert [request["prompt_tokens"] for request in engine.info()["last_paths"]] == [3]


def test_a_model_without_paths_tells_none(tiny_layerwise_checkpoint):
    with engine_of(tiny_layerwise_checkpoint, hosts_here(tiny_layerwise_checkpoint, 1)) as engine:
        run(engine, (1, 21, 22), 4)
        assert engine.info()["last_paths"] == []
