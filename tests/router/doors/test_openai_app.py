"""The HTTP door: the same texts and the same sentences as over gRPC, in OpenAI's shapes."""

import json
import threading
import time

import httpx
import pytest
import uvicorn

from pregate.router.doors.access import TokenFile
from pregate.router.doors.openai_app import build_app
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient
from pregate.router.link.engine_health import EngineClientOptions
from tests.router.running import door, engine_thread, local_engine, socket_folder, wait_for

GREEDY = {"temperature": 0, "ignore_eos": True}


class HttpServer:
    """uvicorn in a thread, on a free port."""

    def __init__(self, app):
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started, what="the HTTP server")
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def close(self):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def engine(tiny_path_checkpoint):
    with local_engine(tiny_path_checkpoint, max_running=2, max_queued=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def endpoint(engine):
    with socket_folder() as folder, engine_thread(engine, f"ipc://{folder}/engine.sock"):
        yield f"ipc://{folder}/engine.sock"


@pytest.fixture(scope="module")
def http(endpoint, tiny_path_checkpoint):
    server = HttpServer(build_app(DoorService(EngineClient(endpoint), tiny_path_checkpoint, "tiny")))
    with httpx.Client(base_url=server.url, timeout=60) as client:
        wait_for(lambda: client.get("/health").status_code == 200, what="health")
        yield client
    server.close()


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def post(http, **body):
    return http.post("/v1/completions", json={"model": "tiny", "prompt": "O wind", **body})


def test_models_lists_the_one_served(http):
    card = http.get("/v1/models").json()
    assert card["object"] == "list"
    assert [(m["id"], m["max_model_len"]) for m in card["data"]] == [("tiny", 256)]


@pytest.mark.parametrize("prompt", ["The harbour", "§ ☃ 🙂", [1, 40, 41]])
def test_text_equals_that_over_grpc_streamed_and_not(http, endpoint, tiny_path_checkpoint, prompt):
    with door(endpoint, tiny_path_checkpoint) as front:
        expected = front.client.complete(prompt, 24, ignore_eos=True)
    whole = post(http, prompt=prompt, max_tokens=24, **GREEDY).json()
    (choice,) = whole["choices"]
    assert (choice["text"], tuple(choice["token_ids"])) == (expected.text, expected.token_ids)
    assert choice["finish_reason"] == "length"
    total = expected.prompt_tokens + 24
    assert whole["usage"] == {
        "prompt_tokens": expected.prompt_tokens,
        "completion_tokens": 24,
        "total_tokens": total,
    }
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = post(http, prompt=prompt, max_tokens=24, **GREEDY, **options)
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = events(response)
    choices = [c for part in parts for c in part["choices"]]
    assert "".join(c["text"] for c in choices) == expected.text
    assert [i for c in choices for i in c["token_ids"]] == list(expected.token_ids)
    assert [c["finish_reason"] for c in choices][-2:] == [None, "length"]
    assert parts[-1]["usage"] == whole["usage"]
    assert len({part["id"] for part in parts}) == 1


@pytest.mark.parametrize(
    ("status", "code", "sentence", "body"),
    [
        (400, "invalid_argument", "max_tokens 0: must be at least 1", {"max_tokens": 0}),
        (
            400,
            "invalid_argument",
            "max_tokens 254: with a prompt of 3 tokens exceeds",
            {"prompt": [5] * 3, "max_tokens": 254},
        ),
        (400, "invalid_argument", "temperature -1.0: must be 0 (greedy) to 100", {"temperature": -1}),
        (400, "invalid_argument", "prompt of 256 tokens: longer than the context of 256", {"prompt": [5] * 256}),
        (400, "invalid_argument", "prompt of 0 tokens", {"prompt": []}),
        (400, "invalid_argument", "prompt of 300 prompts: allowed: at most 512", {"prompt": ["a"] * 300, "n": 2}),
        (400, "invalid_argument", 'prompt ["a", 3]: allowed: text or', {"prompt": ["a", 3]}),
        (400, "invalid_argument", "prompt: half of a surrogate pair ('\\ud800') at character 0", {"prompt": "\ud800"}),
        (400, "invalid_argument", "best_of 2: is not supported", {"best_of": 2}),
        (400, "invalid_argument", "top_k 1000", {"top_k": 10**30}),
        (400, "invalid_argument", "min_tokens 1000", {"min_tokens": 10**30}),
        (400, "invalid_argument", 'logit_bias "9999', {"logit_bias": {"9" * 5000: 1}}),
        (404, "not_found", "model", {"model": "\ud800"}),
        (400, "invalid_argument", 'logit_bias "x": must be a token id', {"logit_bias": {"x": 1}}),
        (400, "invalid_argument", "tempersture 1: unknown option; nearest: temperature; allowed", {"tempersture": 1}),
        (
            400,
            "invalid_argument",
            "stpo null: unknown option; nearest: stop; x.y 2: unknown option; allowed",
            {"stpo": None, "x.y": 2},
        ),
        (
            400,
            "invalid_argument",
            "include_usages true: unknown option; nearest: include_usage",
            {"stream_options": {"include_usages": True}},
        ),
        (400, "invalid_argument", "a0 1: unknown option; a1 1: ", {f"a{n}": 1 for n in range(4000)}),
        (400, "invalid_argument", "prompt null: allowed: text or a list of whole numbers or ", {"prompt": None}),
        (400, "invalid_argument", "prompt [true, 3]: allowed: text or a list of", {"prompt": [True, 3]}),
        (400, "invalid_argument", "max_tokens true: allowed: a whole number", {"max_tokens": True}),
        (
            400,
            "invalid_argument",
            "stop_token_ids [true]: allowed: a list of whole numbers",
            {"stop_token_ids": [True]},
        ),
        (400, "invalid_argument", 'temperature "0": allowed: a number', {"temperature": "0"}),
        (400, "invalid_argument", 'stream_options "x": allowed: an object', {"stream_options": "x"}),
        (400, "invalid_argument", "prompt of 60000 bytes: longer than 255 tokens", {"prompt": "word, " * 10_000}),
        (400, "invalid_argument", "stop_token_ids -1: must be 0 to 511", {"stop_token_ids": [-1]}),
        (400, "invalid_argument", "stop_token_ids 512: must be 0 to 511", {"stop_token_ids": [512]}),
        (400, "invalid_argument", f"stop_token_ids {1 << 64}: must be 0 to 511", {"stop_token_ids": [1 << 64]}),
        (400, "invalid_argument", f"stop_token_ids {10**30}: must be 0 to 511", {"stop_token_ids": [10**30]}),
        (400, "invalid_argument", f"prompt token id {1 << 64}: must be 0 to 511", {"prompt": [1 << 64]}),
        (404, "not_found", "model other: is not served here; allowed: tiny", {"model": "other"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_gets_status_and_sentence(http, status, code, sentence, body, stream):
    text = json.dumps({"model": "tiny", "prompt": "O wind", "stream": stream, **body})
    response = http.post("/v1/completions", content=text, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert error["message"].startswith(sentence)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_larger_than_the_context_can_need_is_refused(http, chunked):
    http.get("/v1/models")  # a door knows the context once its engine has answered, as a replica's has at its start
    body = json.dumps({"model": "tiny", "prompt": "word " * 40_000}).encode()
    response = http.post("/v1/completions", content=iter([body[:100_000], body[100_000:]]) if chunked else body)
    assert response.status_code == 413
    assert response.json()["error"]["message"].endswith("allowed: 71680")


@pytest.mark.parametrize(
    ("path", "content", "sentence"),
    [
        ("completions", b"{", "body: must be a JSON object"),
        ("completions", b"[]", "body: must be a JSON object"),
        ("completions", b"{}", "prompt: missing"),
        ("chat/completions", b'{"messages": "hi"}', 'messages "hi": allowed: a list of objects'),
        ("chat/completions", b'{"messages": [5]}', "messages [5]: allowed: a list of objects"),
        ("chat/completions", b'{"messages": [{"content": "hi"}]}', "role: missing"),
        (
            "chat/completions",
            b'{"messages": [{"role": "user", "content": 5}]}',
            "content 5: allowed: text or a list of",
        ),
    ],
)
def test_a_body_that_is_none_of_ours_is_invalid(http, path, content, sentence):
    response = http.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(sentence)


def test_full_queue_is_429_with_retry_after(http, engine, monkeypatch):
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.02), step())[1], raising=False)
    threads, responses = [], []
    for _ in range(8):
        threads.append(threading.Thread(target=lambda: responses.append(post(http, max_tokens=40, **GREEDY))))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    codes = sorted(r.status_code for r in responses)
    assert codes.count(429) >= 1
    assert set(codes) == {200, 429}
    assert all(r.headers["retry-after"] == "1" for r in responses if r.status_code == 429)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_who_disconnects_frees_the_engine(http, engine, monkeypatch, stream):
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.02), step())[1], raising=False)
    before = engine.info()["num_steps"]
    with httpx.Client(base_url=http.base_url, timeout=1.0) as hasty:
        body = {"model": "tiny", "prompt": "O wind", "max_tokens": 250, "stream": stream, **GREEDY}
        if stream:
            with hasty.stream("POST", "/v1/completions", json=body) as response:
                assert next(response.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                hasty.post("/v1/completions", json=body)
    wait_for(lambda: not engine.has_work, 20, "an idle engine")
    assert engine.info()["num_steps"] - before < 200


def test_without_an_engine_health_is_503_and_calls_too(tiny_dense):
    options = EngineClientOptions(keep_alive_s=0.1, silence_s=0.4)
    with socket_folder() as folder:
        service = DoorService(EngineClient(f"ipc://{folder}/none", options=options), tiny_dense, "tiny")
        server = HttpServer(build_app(service))
        with httpx.Client(base_url=server.url, timeout=20) as client:
            assert client.get("/ready").status_code == 503
            response = post(client)
            assert response.status_code == 503
            assert client.get("/ready").status_code == client.get("/health").status_code == 503
            assert "silent" in response.json()["error"]["message"]
            assert "silent" in client.get("/health").json()["status"]
        server.close()


def test_tokens_are_asked_of_all_but_health(endpoint, tiny_path_checkpoint, tmp_path):
    (tmp_path / "tokens").write_text("alpha\n")
    service = DoorService(EngineClient(endpoint), tiny_path_checkpoint, "tiny")
    server = HttpServer(build_app(service, tokens=TokenFile(tmp_path / "tokens")))
    with httpx.Client(base_url=server.url, timeout=20) as client:
        wait_for(lambda: client.get("/health").status_code == 200, what="health")
        for headers in ({}, {"Authorization": "Bearer beta"}):
            assert client.get("/v1/models", headers=headers).status_code == 401
            assert client.post("/v1/completions", json={"prompt": "x"}, headers=headers).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer alpha"}).status_code == 200
    server.close()


def test_paths_are_told_of_everybody_where_no_token_is_asked_for_and_else_of_ones_own(
    http, endpoint, tiny_path_checkpoint, tmp_path
):
    """Also of clients that send a key to a server that asks for none, as OpenAI's do."""
    (tmp_path / "tokens").write_text("alpha\nbeta\n")
    service = DoorService(EngineClient(endpoint), tiny_path_checkpoint, "tiny")
    server = HttpServer(build_app(service, tokens=TokenFile(tmp_path / "tokens")))
    alpha, beta = ({"Authorization": f"Bearer {name}"} for name in ("alpha", "beta"))
    http.post("/v1/completions", json={"prompt": "O wind", "max_tokens": 3, **GREEDY}, headers=alpha)
    http.post("/v1/completions", json={"prompt": "The harbour", "max_tokens": 4, **GREEDY})
    found = http.get("/paths").json()
    assert (found["model"], found["exact"]) == ("tiny", True)
    assert [request["completion_tokens"] for request in found["requests"][:2]] == [4, 3]
    of_route = http.post("/v1/route", json={"prompt": "The harbour"}).json()["paths"]
    newest = found["requests"][0]
    assert (newest["first"], newest["prompt_tokens"]) == (0, len(of_route))
    assert newest["paths"][: len(of_route)] == of_route and len(newest["paths"]) == len(of_route) + 3
    with httpx.Client(base_url=server.url, timeout=20) as client:
        assert [r["completion_tokens"] for r in client.get("/paths", headers=alpha).json()["requests"]] == [3]
        assert client.get("/paths", headers=beta).json()["requests"] == []
        assert client.get("/paths").status_code == 401
    server.close()
