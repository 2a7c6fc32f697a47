"""A request that brings what it generated before goes on as if its stream had never broken."""

from collections import Counter

import grpc
import pytest

from pregate.client.proto import pregate_pb2 as pb
from tests.router.running import served

PROMPT = "The harbour lay quiet"
OPTIONS = {
    "greedy": {"ignore_eos": True},
    "drawn": {"temperature": 1.0, "seed": 5, "ignore_eos": True},
    "penalties": {"temperature": 0.8, "seed": 3, "presence_penalty": 1.5, "frequency_penalty": 1.0, "ignore_eos": True},
    "min_tokens": {"temperature": 1.5, "seed": 7, "min_tokens": 9},
    "logprobs": {"logprobs": 2, "prompt_logprobs": 1, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def front(tiny_path_checkpoint):
    with served(tiny_path_checkpoint) as (_, front):
        yield front


def resumed(front, known_ids, max_tokens=16, stop=(), **options):
    """Chunks' ids and text, and the completion, of a request that goes on after `known_ids`."""
    sampling = pb.SamplingParams(max_tokens=max_tokens, stop=stop, **options)
    request = pb.GenerateRequest(
        text=PROMPT, sampling_params=sampling, stream=True, resumes=True, generated_ids=known_ids
    )
    answers = list(front.stub.Generate(request, timeout=60))
    chunks = [answer.chunk for answer in answers if answer.HasField("chunk")]
    assert [a.HasField("complete") for a in answers].count(True) == 1
    return chunks, answers[-1].complete


def check(front, whole, known_ids, **options):
    chunks, complete = resumed(front, known_ids, **options)
    assert [i for chunk in chunks for i in chunk.token_ids] == list(whole.output_ids)
    assert "".join(chunk.text for chunk in chunks) == whole.text == complete.text
    for name in ("output_ids", "finish_reason", "prompt_tokens", "completion_tokens"):
        assert getattr(complete, name) == getattr(whole, name), name


@pytest.mark.parametrize("name", OPTIONS)
def test_wherever_it_broke_the_answer_is_that_of_the_unbroken(front, name):
    _, whole = resumed(front, [], **OPTIONS[name])
    assert len(whole.output_ids) >= 9
    for num_known in (1, 2, 7, len(whole.output_ids) - 1, len(whole.output_ids)):
        check(front, whole, whole.output_ids[:num_known], **OPTIONS[name])


def test_penalties_count_what_was_generated_before(front):
    """As prompt those tokens would come again: greedy text of this model repeats itself."""
    options = {"frequency_penalty": 2.0, "ignore_eos": True}
    _, whole = resumed(front, [], **options)
    _, free = resumed(front, [], ignore_eos=True)
    assert max(Counter(whole.output_ids).values()) < max(Counter(free.output_ids).values())
    check(front, whole, whole.output_ids[:8], **options)


def test_a_stop_string_across_the_break_is_found(front):
    _, free = resumed(front, [], ignore_eos=True)
    stop = free.text[3:9]
    _, whole = resumed(front, [], stop=[stop])
    assert whole.finish_reason == "stop"
    for num_known in range(1, len(whole.output_ids) + 1):
        check(front, whole, whole.output_ids[:num_known], stop=[stop])


def test_logprobs_are_those_of_new_tokens(front):
    chunks, whole = resumed(front, [], **OPTIONS["logprobs"])
    known = list(whole.output_ids[:6])
    later, complete = resumed(front, known, **OPTIONS["logprobs"])
    assert list(later[0].token_ids) == known
    assert not later[0].HasField("output_logprobs")
    assert list(complete.output_logprobs.token_ids) == list(whole.output_ids[6:])
    assert complete.output_logprobs.token_logprobs == pytest.approx(whole.output_logprobs.token_logprobs[6:], abs=1e-4)
    assert sum(chunk.HasField("input_logprobs") for chunk in chunks) == 1
    assert not complete.HasField("input_logprobs"), "they came with the first token"


@pytest.mark.parametrize(
    ("known_ids", "n", "sentence"), [([1], 2, "n 2: allowed beside"), ([1 << 20], 1, "generated token id 1048576")]
)
def test_what_cannot_be_gone_on_after_is_named(front, known_ids, n, sentence):
    with pytest.raises(grpc.RpcError, match=sentence) as error:
        resumed(front, known_ids, n=n)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
