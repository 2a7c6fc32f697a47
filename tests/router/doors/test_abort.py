"""Requests are ended from outside by those whose they are, and their ids are taken while they run."""

import pytest

from pregate.base.errors import UserError
from pregate.client.client import Client
from pregate.client.proto import pregate_pb2 as pb
from pregate.router.doors.access import AccessOptions
from pregate.router.doors.grpc_options import GrpcOptions
from tests.router.running import door, engine_thread, local_engine, served, slow_steps, socket_folder, wait_for

LONG = {"max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def front(tiny_path_checkpoint):
    with served(tiny_path_checkpoint) as (engine, front):
        slow_steps(engine, 0.01)
        yield engine, front


@pytest.mark.parametrize("n", [1, 3])
def test_an_aborted_request_ends_with_what_it_has(front, n):
    engine, front = front
    call = front.client.generate("O wind", n=n, **LONG)
    first = next(call)
    assert front.client.abort(call.request_id, "unknown") == (call.request_id,)
    rest = list(call)
    assert [done.finish_reason for done in call.completions] == ["abort"] * n
    of_first = [c.text for c in (first, *rest) if c.index == 0]
    assert call.completion.text == "".join(of_first)
    assert call.completion.completion_tokens == len(call.completion.token_ids) < 200
    wait_for(lambda: not engine.has_work, what="an idle engine")
    assert front.client.abort(call.request_id) == ()


def test_one_that_only_waits_for_its_answer_is_aborted_too(front):
    _, front = front
    call = front.client.generate("O wind", stream=False, request_id="mine", **LONG)
    wait_for(lambda: front.client.loads().num_requests == 1, what="the request")
    wait_for(lambda: front.client.abort("mine") == ("mine",), what="the abort")
    assert list(call) == []
    assert call.completion.finish_reason == "abort"


def test_an_id_that_runs_is_refused_and_taken_over_by_one_that_resumes(front):
    engine, front = front
    first = front.client.generate("O wind", request_id="twice", **LONG)
    next(first)
    with pytest.raises(UserError, match="request_id twice: is running already"):
        list(front.client.generate("O wind", request_id="twice", **LONG))
    sampling = pb.SamplingParams(max_tokens=3, ignore_eos=True)
    again = pb.GenerateRequest(text="O wind", request_id="twice", resumes=True, sampling_params=sampling)
    assert [answer.complete.finish_reason for answer in front.stub.Generate(again, timeout=60)] == ["length"]
    list(first)
    assert first.completion.finish_reason == "abort"
    wait_for(lambda: not engine.has_work, what="an idle engine")
    assert front.client.complete("O wind", 2, request_id="twice", ignore_eos=True).finish_reason == "length"


def test_only_the_same_token_holder_may(tiny_path_checkpoint, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("alpha\nbeta\n")
    options = GrpcOptions(port=0, access=AccessOptions(token_file=tokens))
    with local_engine(tiny_path_checkpoint) as engine, socket_folder() as folder:
        endpoint = f"ipc://{folder}/engine.sock"
        slow_steps(engine, 0.01)
        with (
            engine_thread(engine, endpoint),
            door(endpoint, tiny_path_checkpoint, engine_first=True, grpc_options=options) as front,
            Client(front.target, token="alpha") as alpha,
            Client(front.target, token="beta") as beta,
        ):
            wait_for(front.client.health, what="health")
            calls = [client.generate("O wind", request_id="same", **LONG) for client in (alpha, beta)]
            for call in calls:
                next(call)
            assert beta.abort("same") == ("same",)
            list(calls[1])
            assert calls[1].completion.finish_reason == "abort"
            assert next(calls[0]).text is not None
            assert calls[0].completion is None
            calls[0].cancel()
