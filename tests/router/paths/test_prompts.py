"""Prompts get the paths that the reference gives, all of them an answer, and short ones soon."""

import numpy as np
import pytest

from pregate.base.errors import CheckpointError, QueueFullError, UserError
from pregate.model.checkpoint import CheckpointReader
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_computer import PathComputer
from pregate.router.link.messages import FailedEvent, RouteReply, RouteRequest
from pregate.router.paths.load import load_router
from pregate.router.paths.options import PathOptions
from pregate.router.paths.prompts import Prompts

CONTEXT = 5000


@pytest.fixture(scope="module")
def computer(tiny_path_checkpoint):
    return PathComputer(load_router(CheckpointReader(tiny_path_checkpoint)))


def prompts(computer, clock=lambda: 0.0, **options):
    return Prompts(computer, PathOptions(**options), CONTEXT, "v", clock)


def ids(num_tokens, seed=0):
    return tuple(np.random.default_rng(seed).integers(3, 200, num_tokens).tolist())


def run(work):
    """Turns until nothing waits: the answers in order."""
    answers = []
    for _ in range(1000):
        if not len(work):
            return answers
        answers += work.turn()
    raise AssertionError("it does not end")


def test_paths_and_states_are_those_of_the_model(computer, tiny_path_checkpoint):
    model = RoutedForCausalLM.from_pretrained(tiny_path_checkpoint).path_computer
    work = prompts(computer)
    texts = {str(n): ids(n, n) for n in (1, 3, 511, 512, 513, 1300, 40)}
    for name, text in texts.items():
        work.add(RouteRequest(name, text, with_state=name != "3"), 0.0)
    answers = {answer.request_id: answer for answer in run(work)}
    assert answers.keys() == texts.keys()
    for name, text in texts.items():
        (expected,), (state,) = model.extend([model.new_state()], [list(text)])
        answer = answers[name]
        assert isinstance(answer, RouteReply)
        assert np.array_equal(answer.paths.slice(0, len(text)).ids, expected.ids)
        assert (answer.state is None) == (name == "3")
        if answer.state is not None:
            found = np.frombuffer(answer.state.data).reshape(answer.state.shape)
            np.testing.assert_allclose(found, state.kept.numpy(), atol=1e-12)


def test_a_request_id_that_waits_already_is_refused(computer):
    work = prompts(computer)
    work.add(RouteRequest("a", ids(40)), 0.0)
    with pytest.raises(UserError, match="request id a: waits already"):
        work.add(RouteRequest("a", ids(50, 1)), 0.0)
    (answer,) = run(work)
    assert answer.paths.num_tokens == 40


def test_a_short_prompt_does_not_wait_for_long_ones(computer):
    work = prompts(computer)
    for number in range(20):
        work.add(RouteRequest(f"long {number}", ids(2000)), 0.0)
    work.turn()
    work.add(RouteRequest("short", ids(5)), 0.0)
    answers = work.turn() + work.turn()
    assert [answer.request_id for answer in answers] == ["short"]


def test_a_long_prompt_does_not_wait_for_ever_for_short_ones(computer):
    work = prompts(computer)
    work.add(RouteRequest("long", ids(2000)), 0.0)
    ended = []
    for turn in range(12):
        work.add(RouteRequest(f"short {turn}", ids(5)), 0.0)
        ended += [answer.request_id for answer in work.turn()]
    assert "long" in ended


def test_it_refuses_what_is_too_much(computer):
    work = prompts(computer, max_prompts=2)
    work.add(RouteRequest("a", ids(5)), 0.0)
    work.add(RouteRequest("b", ids(5)), 0.0)
    with pytest.raises(QueueFullError, match="2 prompts of"):
        work.add(RouteRequest("c", ids(5)), 0.0)
    work.cancel("a")
    work.add(RouteRequest("c", ids(5)), 0.0)
    small = prompts(computer, max_bytes=4000)
    small.add(RouteRequest("a", ids(20)), 0.0)
    with pytest.raises(QueueFullError, match="1 prompts of"):
        small.add(RouteRequest("b", ids(80)), 0.0)
    with pytest.raises(UserError, match=r"prompt of 1000 tokens: needs .* allowed: 4000"):
        small.add(RouteRequest("b", ids(1000)), 0.0)
    for bad in ((), (1 << 40,), ids(CONTEXT + 1)):
        with pytest.raises(UserError, match="prompt"):
            work.add(RouteRequest("d", bad), 0.0)


def test_deadlines_and_cancels_end_a_prompt_between_chunks(computer):
    now = [0.0]
    work = prompts(computer, clock=lambda: now[0])
    work.add(RouteRequest("late", ids(2000), deadline_s=5.0), -1.0)
    work.add(RouteRequest("gone", ids(2000)), 0.0)
    assert work.turn() == []
    work.cancel("gone")
    work.cancel("never there")
    now[0] = 4.0
    (answer,) = work.turn()
    assert isinstance(answer, FailedEvent)
    assert (answer.request_id, answer.code) == ("late", "DEADLINE_EXCEEDED")
    assert len(work) == 0 and work.turn() == []
    assert work.info()["queued_bytes"] == 0


def test_a_checkpoint_without_a_path_router_is_refused(tiny_layerwise_checkpoint):
    with pytest.raises(UserError, match="no path router"):
        load_router(CheckpointReader(tiny_layerwise_checkpoint))


def test_a_tensor_that_lacks_is_named(tiny_path_checkpoint, monkeypatch):
    reader = CheckpointReader(tiny_path_checkpoint)
    monkeypatch.setattr(reader, "shards", [])
    with pytest.raises(CheckpointError, match=r"path router: .*embedding\.weight"):
        load_router(reader)
