"""OpenAI's own client against the HTTP door: what it sends is understood, and what it reads is what it expects.

The model is the shipped quartet with a chat template; PREGATE_CHAT_MODEL names another served folder to try.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from pathlib import Path

import openai
import pytest

from pregate.router.doors.access import TokenFile
from pregate.router.doors.openai_app import build_app
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient
from tests.router.doors.test_openai_app import HttpServer
from tests.router.running import engine_thread, local_engine, socket_folder, wait_for

QUARTET = Path(__file__).resolve().parents[3] / "examples" / "quartet-paths"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ raise_exception('the last message must be the user\\'s') }}{% endif %}{{ m['content'] }} {% endfor %}"
)
GREEDY = {"temperature": 0.0, "extra_body": {"ignore_eos": True}}
ASKED = [{"role": "system", "content": "Once upon a time"}, {"role": "user", "content": "there was a"}]


@pytest.fixture(scope="module")
def model() -> Path:
    given = os.environ.get("PREGATE_CHAT_MODEL")
    return Path(given) if given else QUARTET


@pytest.fixture(scope="module")
def engine(model):
    with local_engine(model, max_running=8, max_queued=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for file in model.glob("*token*"):
        shutil.copy(file, folder)
    own = model / "chat_template.jinja"
    (folder / own.name).write_text(own.read_text() if own.is_file() else TEMPLATE)
    tokens = folder / "keys"
    tokens.write_text("sk-alpha\n")
    with socket_folder() as sockets, engine_thread(engine, f"ipc://{sockets}/e"):
        service = DoorService(EngineClient(f"ipc://{sockets}/e"), folder, "quartet")
        server = HttpServer(build_app(service, tokens=TokenFile(tokens)))
        yield f"{server.url}/v1"
        server.close()


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="sk-alpha", max_retries=0, timeout=60) as client:
        yield client


def test_models(client):
    (card,) = client.models.list().data
    assert (card.id, card.object, card.owned_by) == ("quartet", "model", "pregate")
    assert abs(card.created - time.time()) < 3600
    assert client.models.retrieve("quartet") == card
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("other/name")


def test_a_chat_whole_and_streamed(client):
    asked = {"model": "quartet", "messages": ASKED, "max_completion_tokens": 12, **GREEDY}
    whole = client.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-") and whole.model == "quartet"
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {c.object for c in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert all(c.choices[0].delta.role is None for c in chunks[1:-1])
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-2:] == [None, "length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])


def test_a_chat_is_the_completion_of_its_prompt(client, model):
    if model != QUARTET:
        pytest.skip("another template than the quartet's")
    chat = client.chat.completions.create(model="quartet", messages=ASKED, max_tokens=8, **GREEDY)
    text = client.completions.create(model="quartet", prompt="Once upon a time there was a ", max_tokens=8, **GREEDY)
    assert chat.choices[0].message.content == text.choices[0].text
    assert chat.usage == text.usage, "one BOS, the template's"


def test_a_chat_without_a_limit_ends_where_the_context_does(client, engine, model):
    if model != QUARTET:
        pytest.skip("its context is long")
    long = [{"role": "user", "content": "there was a " * 150}]
    answer = client.chat.completions.create(model="quartet", messages=long, **GREEDY)
    assert answer.usage.total_tokens == engine.info()["max_context"]


def test_what_a_chat_gave_can_be_sent_back(client):
    first = client.chat.completions.create(model="quartet", messages=ASKED, max_tokens=4, **GREEDY)
    talk = [*ASKED, first.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "and"}]}]
    assert client.chat.completions.create(model="quartet", messages=talk, max_tokens=4, **GREEDY).choices


def test_n_choices_with_seeds_whole_and_streamed(client):
    asked = {"model": "quartet", "messages": ASKED, "max_tokens": 8, "n": 3, "seed": 5, "temperature": 1.5}
    whole = client.chat.completions.create(**asked)
    texts = [c.message.content for c in whole.choices]
    assert [c.index for c in whole.choices] == [0, 1, 2] and len(set(texts)) > 1
    assert client.chat.completions.create(**asked).choices == whole.choices
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_stop_ends_a_chat_and_a_completion(client):
    free = client.completions.create(model="quartet", prompt="Once upon", max_tokens=30, **GREEDY).choices[0].text
    stop = free[10:13]
    for asked in (stop, [stop, "\0never"]):
        choice = client.completions.create(
            model="quartet", prompt="Once upon", max_tokens=30, stop=asked, temperature=0.0
        ).choices[0]
        assert (choice.text, choice.finish_reason) == (free[: free.index(stop)], "stop")
    chat = client.chat.completions.create(model="quartet", messages=ASKED, max_tokens=30, **GREEDY)
    word = chat.choices[0].message.content[6:9]
    cut = client.chat.completions.create(model="quartet", messages=ASKED, max_tokens=30, stop=word, temperature=0.0)
    assert cut.choices[0].message.content == chat.choices[0].message.content.split(word)[0]


def test_logprobs_of_a_chat(client):
    asked = {"model": "quartet", "messages": ASKED, "max_tokens": 5, "logprobs": True, **GREEDY}
    whole = client.chat.completions.create(**asked, top_logprobs=3).choices[0]
    content = whole.logprobs.content
    assert "".join(t.token for t in content).replace("<|im_end|>", "").strip() == whole.message.content.strip()
    assert all(t.logprob <= 0 and t.bytes == list(t.token.encode()) for t in content)
    assert all(len(t.top_logprobs) == 3 and t.top_logprobs[0].token == t.token for t in content), "greedy"
    streamed = [
        token
        for chunk in client.chat.completions.create(**asked, top_logprobs=3, stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [t.token for t in streamed] == [t.token for t in content]
    assert [t.logprob for t in streamed] == pytest.approx([t.logprob for t in content], abs=1e-4)
    none = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert [t.top_logprobs for t in none] == [[]] * 5


def test_several_prompts_and_their_order(client):
    prompts = ["Once upon", "The", "One day"]
    alone = [client.completions.create(model="quartet", prompt=p, max_tokens=6, **GREEDY) for p in prompts]
    expected = [a.choices[0].text for a in alone]
    whole = client.completions.create(model="quartet", prompt=prompts, max_tokens=6, **GREEDY)
    assert [(c.index, c.text) for c in whole.choices] == list(enumerate(expected))
    assert whole.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone)
    assert whole.usage.completion_tokens == 18
    streamed = ["", "", ""]
    for chunk in client.completions.create(model="quartet", prompt=prompts, max_tokens=6, stream=True, **GREEDY):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected
    twice = client.completions.create(model="quartet", prompt=prompts[:2], max_tokens=6, n=2, seed=1, temperature=1)
    assert [c.index for c in twice.choices] == [0, 1, 2, 3]
    assert twice.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone[:2])


@pytest.mark.parametrize("stream", [False, True])
def test_echo_repeats_the_prompt_with_its_logprobs(client, url, stream):
    """As evaluation harnesses ask: prompts as ids, the likelihood of each of their tokens."""
    root = client.with_options(base_url=url.removesuffix("/v1"))
    texts = ["Once upon a time", "The cat"]
    ids = [root.post("/tokenize", body={"prompt": t}, cast_to=object)["tokens"] for t in texts]
    asked = {"model": "quartet", "prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, **GREEDY}
    free = client.completions.create(**(asked | {"echo": False, "logprobs": None}))
    if stream:
        parts: list = [[], []]
        for chunk in client.completions.create(**asked, stream=True):
            parts[chunk.choices[0].index].append(chunk.choices[0])
        found = [("".join(c.text for c in cs), [c.logprobs for c in cs if c.logprobs]) for cs in parts]
        names = ("token_logprobs", "tokens", "top_logprobs")
        lists = [{name: [x for p in parts for x in getattr(p, name)] for name in names} for _, parts in found]
        got = [text for text, _ in found]
    else:
        whole = client.completions.create(**asked)
        assert all(len(c.logprobs.text_offset) == len(c.logprobs.tokens) for c in whole.choices)
        lists, got = [c.logprobs.model_dump() for c in whole.choices], [c.text for c in whole.choices]
    for number, (text, logprobs) in enumerate(zip(got, lists, strict=True)):
        assert text.endswith(free.choices[number].text) and texts[number] in text
        assert len(logprobs["tokens"]) == len(ids[number]) + 1
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        values = logprobs["token_logprobs"][1:]
        assert all(value <= 0 for value in values)
        pairs = zip(values, logprobs["top_logprobs"][1:], strict=True)
        assert all(value <= max(top.values()) + 1e-6 for value, top in pairs)
        assert math.isclose(values[-1], max(logprobs["top_logprobs"][-1].values()), abs_tol=1e-6), "greedy"


def test_echo_alone_generates_nothing(client):
    whole = client.completions.create(model="quartet", prompt="The cat", max_tokens=0, echo=True, logprobs=0)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("The cat", "length")
    assert whole.usage.completion_tokens == 0
    assert len(whole.choices[0].logprobs.token_logprobs) == whole.usage.prompt_tokens


def test_penalties_and_bias(client):
    asked = {"model": "quartet", "messages": ASKED, "max_tokens": 30, **GREEDY}
    free = client.chat.completions.create(**asked).choices[0].message.content
    tense = client.chat.completions.create(**asked, presence_penalty=2.0, frequency_penalty=2.0)
    assert tense.choices[0].message.content != free
    asked = {"model": "quartet", "prompt": "Once upon", "max_tokens": 1, **GREEDY}
    token_ids = client.completions.create(**asked).choices[0].token_ids
    biased = client.completions.create(**asked, logit_bias={str(token_ids[0]): -100})
    assert biased.choices[0].token_ids != token_ids


@pytest.mark.parametrize(
    ("kind", "param", "sentence", "options"),
    [
        (openai.BadRequestError, "max_completion_tokens", "must be at least 1", {"max_completion_tokens": 0}),
        (openai.BadRequestError, "temperature", "must be 0", {"temperature": -1}),
        (openai.BadRequestError, "top_logprobs", "needs logprobs true", {"top_logprobs": 2}),
        (openai.BadRequestError, "top_logprobs", "must be 0 to 20", {"top_logprobs": 21, "logprobs": True}),
        (openai.BadRequestError, "tools", "is not supported", {"tools": [{"type": "function", "function": {}}]}),
        (openai.BadRequestError, "response_format", "is not supported", {"response_format": {"type": "json_object"}}),
        (openai.BadRequestError, "messages", "at least one is needed", {"messages": []}),
        (openai.BadRequestError, "messages.0.content.0", "allowed", {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        (openai.BadRequestError, "tempersture", "nearest: temperature", {"extra_body": {"tempersture": 1}}),
        (openai.NotFoundError, None, "is not served here; allowed: quartet", {"model": "gpt"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_openai_s(client, kind, param, sentence, options, stream):
    with pytest.raises(kind, match=sentence) as caught:
        client.chat.completions.create(**({"model": "quartet", "messages": ASKED, "stream": stream} | options))
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code", "request_id"}
    assert body["param"] == param


def test_what_the_template_refuses_is_the_caller_s_error(client, model):
    if model != QUARTET:
        pytest.skip("another template than the quartet's")
    talk = [*ASKED, {"role": "assistant", "content": "x"}]
    with pytest.raises(openai.BadRequestError, match="the last message must be the user's"):
        client.chat.completions.create(model="quartet", messages=talk)


def test_a_wrong_key_is_an_authentication_error(url):
    with openai.OpenAI(base_url=url, api_key="sk-beta", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError, match="Bearer TOKEN"):
            stranger.models.list()
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model="quartet", messages=[])


@pytest.mark.parametrize("streamed", [False, True])
def test_who_leaves_cancels(client, engine, monkeypatch, streamed):
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.02), step())[1], raising=False)
    before = engine.info()["num_steps"]
    asked = {"model": "quartet", "messages": ASKED, "max_tokens": 400, **GREEDY}
    if streamed:
        with client.chat.completions.create(**asked, stream=True) as stream:
            assert next(iter(stream))
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=1.0).chat.completions.create(**asked)
    wait_for(lambda: not engine.has_work, 20, "an idle engine")
    assert engine.info()["num_steps"] - before < 300


def test_who_leaves_before_the_first_token_cancels_too(client, engine, monkeypatch):
    """A stream has no status yet then, and its task waits for the engine alone."""
    release, step = threading.Event(), engine.step
    monkeypatch.setattr(engine, "step", lambda: (release.wait(20), step())[1], raising=False)
    steps = engine.info()["num_steps"]
    try:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).chat.completions.create(
                model="quartet", messages=ASKED, max_tokens=300, stream=True, **GREEDY
            )
        time.sleep(0.5)
    finally:
        release.set()
    wait_for(lambda: not engine.has_work, 20, "an idle engine")
    assert engine.info()["num_steps"] - steps == 1, "told before the first token was there"


def test_a_full_queue_says_when_to_come_again(client, engine, monkeypatch):
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.02), step())[1], raising=False)
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="quartet", prompt=["The"] * 64, max_tokens=40, **GREEDY)
    assert caught.value.response.headers["retry-after"] == "1"
    assert isinstance(caught.value.body, dict) and caught.value.body["type"] == "rate_limit_error"
    wait_for(lambda: not engine.has_work, 20, "an idle engine: the others were cancelled")
