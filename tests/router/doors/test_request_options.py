"""What a request asks for, over gRPC and over HTTP: n completions, stop strings, logprobs, penalties."""

from __future__ import annotations

import pytest

from pregate.base.errors import UserError
from pregate.router.doors.openai_app import build_app
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient
from tests.router.doors.test_openai_app import GREEDY, HttpServer, events, post
from tests.router.running import door, engine_thread, local_engine, socket_folder, wait_for

httpx = pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def engine(tiny_path_checkpoint):
    with local_engine(tiny_path_checkpoint) as engine:
        yield engine


@pytest.fixture(scope="module")
def doors(engine, tiny_path_checkpoint):
    """(gRPC client, HTTP client) of one engine."""
    with socket_folder() as folder:
        endpoint = f"ipc://{folder}/engine.sock"
        with engine_thread(engine, endpoint), door(endpoint, tiny_path_checkpoint, engine_first=True) as front:
            server = HttpServer(build_app(DoorService(EngineClient(endpoint), tiny_path_checkpoint, "tiny")))
            with httpx.Client(base_url=server.url, timeout=60) as http:
                wait_for(lambda: http.get("/health").status_code == 200, what="health")
                yield front.client, http
            server.close()


def test_n_completions_share_a_prompt_and_each_has_its_seed(doors):
    client, http = doors
    options = {"temperature": 1.5, "ignore_eos": True}
    alone = [client.complete("O wind", 12, seed=seed, **options).text for seed in (7, 8, 9)]
    generation = client.generate("O wind", 12, seed=7, n=3, **options)
    texts = ["", "", ""]
    for chunk in generation:
        texts[chunk.index] += chunk.text
    assert texts == alone and len(set(alone)) == 3
    assert sorted((c.index, c.text) for c in generation.completions) == list(enumerate(alone))
    assert generation.completion is not None and generation.completion.index == 0
    body = {"max_tokens": 12, "seed": 7, "n": 3, **options}
    answer = post(http, **body).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == list(enumerate(alone))
    assert answer["usage"]["completion_tokens"] == 36
    texts = ["", "", ""]
    for part in events(post(http, stream=True, **body)):
        for choice in part["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == alone


def test_a_stop_string_ends_the_text_and_frees_the_engine(doors, engine):
    client, http = doors
    free = client.complete("The harbour", 60, ignore_eos=True)
    stop = free.text[12:15]
    expected = free.text[: free.text.index(stop)]
    for options in ({"stop": stop}, {"stop": ["\0never", stop]}):
        done = client.complete("The harbour", 60, ignore_eos=True, **options)
        assert (done.text, done.finish_reason) == (expected, "stop")
        assert done.token_ids == free.token_ids[: done.completion_tokens]
        choice = post(http, prompt="The harbour", max_tokens=60, **GREEDY, **options).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    parts = events(post(http, prompt="The harbour", max_tokens=60, stream=True, stop=stop, **GREEDY))
    assert "".join(c["text"] for p in parts for c in p["choices"]) == expected
    wait_for(lambda: not engine.has_work, 10, "an idle engine")


def test_the_model_s_own_stop_strings_end_a_text_too(doors, engine, monkeypatch):
    client, _ = doors
    free = client.complete("The harbour", 60, ignore_eos=True)
    try:
        monkeypatch.setattr(engine, "stop_strings", ("e",))
        client.model_info()  # doors learn of them with the limits
        assert client.complete("The harbour", 60, ignore_eos=True).text == free.text
        ended = client.complete("The harbour", 60).text
    finally:
        monkeypatch.undo()
        client.model_info()
    assert "e" not in ended and free.text.startswith(ended)


def test_logprobs_are_the_same_at_every_door(doors):
    client, http = doors
    done = client.complete("O wind", 5, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    chunks = list(client.generate("O wind", 5, ignore_eos=True, logprobs=2, prompt_logprobs=1))
    assert sum((c.logprobs for c in chunks), ()) == done.logprobs
    assert sum((c.prompt_logprobs for c in chunks), ()) == done.prompt_logprobs
    assert [t.token_id for t in done.logprobs] == list(done.token_ids)
    assert [t.top[0][0] for t in done.logprobs] == list(done.token_ids), "greedy takes the likeliest"
    assert len(done.prompt_logprobs) == done.prompt_tokens - 1
    choice = post(http, max_tokens=5, logprobs=2, prompt_logprobs=1, **GREEDY).json()["choices"][0]
    assert choice["logprobs"]["token_ids"] == list(done.token_ids)
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([t.logprob for t in done.logprobs], abs=1e-5)
    assert len(choice["prompt_logprobs"]["token_logprobs"]) == done.prompt_tokens - 1


def test_penalties_and_bias_reach_the_engine(doors):
    client, http = doors
    free = client.complete("O wind", 16, ignore_eos=True)
    bias = {free.token_ids[0]: -100.0}
    for options in (
        {"logit_bias": bias},
        {"repetition_penalty": 3.0},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"temperature": 1.0, "seed": 3, "top_k": 2},
        {"temperature": 2.0, "seed": 3, "min_p": 0.3},
        {"min_tokens": 16, "stop_token_ids": [free.token_ids[0]]},
    ):
        done = client.complete("O wind", 16, ignore_eos=True, **options)
        assert done.token_ids != free.token_ids, options
        body = {**GREEDY, **options}
        body |= {"logit_bias": {str(k): v for k, v in bias.items()}} if "logit_bias" in options else {}
        assert post(http, max_tokens=16, **body).json()["choices"][0]["token_ids"] == list(done.token_ids)


@pytest.mark.parametrize(
    ("sentence", "options"),
    [
        ("top_k -2: must be 0", {"top_k": -2}),
        ("min_p 1.5: must be 0 to 1", {"min_p": 1.5}),
        ("repetition_penalty 0.0: must be 0.01 to 100", {"repetition_penalty": 0.0}),
        ("presence_penalty 2.5: must be -2 to 2", {"presence_penalty": 2.5}),
        ("frequency_penalty -3.0: must be -2 to 2", {"frequency_penalty": -3.0}),
        ("n 0: must be 1 to 128", {"n": 0}),
        ("n 200: must be 1 to 128", {"n": 200}),
        ("min_tokens -1: must be 0 or more", {"min_tokens": -1}),
        ("logprobs 21: must be 0 to 20", {"logprobs": 21}),
        ("stop of 0 characters: must be 1 to 256 characters", {"stop": ["a", ""]}),
        ("stop of 17 texts: allowed: at most 16", {"stop": ["a"] * 17}),
        ("logit_bias token id 512: must be 0 to 511", {"logit_bias": {512: 1.0}}),
        ("logit_bias 101.0: must be -100 to 100", {"logit_bias": {5: 101.0}}),
    ],
)
def test_values_out_of_range_are_named_at_every_door(doors, sentence, options):
    client, http = doors
    with pytest.raises(UserError, match=sentence):
        client.complete("O wind", 4, **options)
    body = {**options, "logit_bias": {str(k): v for k, v in options.get("logit_bias", {}).items()}}
    response = post(http, max_tokens=4, **body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(sentence)
