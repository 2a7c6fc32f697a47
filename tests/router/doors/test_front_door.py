"""Client, gRPC door, service, channel and a real engine: what is asked is answered, once, with the right status."""

import asyncio
import multiprocessing
import os
import signal
import time

import grpc
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from pregate.base.errors import DeadlineError, NotFoundError, QueueFullError, UnavailableError, UserError
from pregate.client.client import Client
from pregate.client.proto import pregate_pb2 as pb
from pregate.model.modeling import RoutedForCausalLM
from tests.processes import PROCESSES
from tests.router.running import door, engine_thread, local_engine, served, slow_steps, socket_folder, wait_for

PROMPTS = ["The harbour lay quiet", "How many loaves", "O wind", "In the year that followed, the town", "§ ☃ 🙂", ""]


@pytest.fixture(scope="module")
def checkpoint(tiny_path_checkpoint):
    return tiny_path_checkpoint


@pytest.fixture(scope="module")
def front(checkpoint):
    with served(checkpoint) as (engine, front):
        yield engine, front


@pytest.fixture
def client(front):
    return front[1].client


def idle(client):
    info = client.model_info()
    return info.num_running == info.num_queued == 0


def test_stream_is_the_whole_in_pieces(client, checkpoint):
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    for prompt in PROMPTS:
        whole = client.complete(prompt, 24, ignore_eos=True)
        stream = client.generate(prompt, 24, ignore_eos=True)
        chunks = list(stream)
        assert stream.completion is not None
        assert "".join(c.text for c in chunks) == whole.text == stream.completion.text
        assert sum((c.token_ids for c in chunks), ()) == whole.token_ids == stream.completion.token_ids
        assert [c.completion_tokens for c in chunks][-1] == whole.completion_tokens == 24
        prompt_ids = tokenizer.encode(prompt).ids
        assert whole.prompt_tokens == len(prompt_ids)
        assert tokenizer.decode([*prompt_ids, *whole.token_ids]) == tokenizer.decode(prompt_ids) + whole.text
        assert whole.finish_reason == "length"
        assert client.complete(prompt_ids, 24, ignore_eos=True).token_ids == whole.token_ids


def test_many_streams_at_once_say_what_each_says_alone(client):
    prompts = [f"{p} {i}" for i, p in enumerate(PROMPTS * 4)]
    streams = [client.generate(p, 16, ignore_eos=True) for p in prompts]
    texts = ["".join(chunk.text for chunk in stream) for stream in streams]
    assert texts == [client.complete(p, 16, ignore_eos=True).text for p in prompts]
    assert len(set(texts)) > len(texts) // 2, "the prompts must give different texts"


def test_rows_per_host_count_every_expert_of_every_computed_token(client, checkpoint):
    done = client.complete("The harbour", 5, ignore_eos=True)
    prompt = AutoTokenizer.from_pretrained(checkpoint)("The harbour")["input_ids"]
    computed = [*prompt, *done.token_ids[:-1]]  # the last token is not fed back
    paths = RoutedForCausalLM.from_pretrained(checkpoint).paths(computed)
    assert sum(done.rows_per_host) == (paths.ids >= 0).sum()


def test_a_seed_fixes_the_sampled_text(client):
    def sample(seed):
        return client.complete("O wind", 24, temperature=1.5, top_p=0.95, seed=seed, ignore_eos=True).token_ids

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_stop_token_ends_the_text_before_itself(client):
    free = client.complete("How many", 16, ignore_eos=True)
    stop = free.token_ids[5]
    cut = client.complete("How many", 16, ignore_eos=True, stop_token_ids=[stop])
    assert cut.finish_reason == "stop"
    assert cut.token_ids == free.token_ids[: free.token_ids.index(stop)]


def test_model_info_tells_what_is_served(client, checkpoint):
    config = RoutedForCausalLM.from_pretrained(checkpoint).config
    info = client.model_info()
    assert (info.model, info.routing, info.has_path_router) == ("tiny", "path", True)
    assert info.max_context_length == config.text_config.max_position_embeddings
    assert (info.vocab_size, info.num_layers, info.num_hosts) == (512, len(config.cuts), 1)


def test_route_gives_the_paths_of_the_reference_model(client, checkpoint):
    model = RoutedForCausalLM.from_pretrained(checkpoint).eval()
    route = client.route("The farmer waits for rain")
    expected = model.paths(list(route.token_ids)).ids
    assert route.exact
    assert route.version == client.model_info().version != ""
    assert route.tokens[0] == "<s>"
    assert [[list(e) for e in layers] for layers in route.paths] == [
        [[int(e) for e in row if e >= 0] for row in token] for token in expected
    ]


def test_route_of_a_layerwise_checkpoint_names_the_remedy(tiny_layerwise_checkpoint):
    with served(tiny_layerwise_checkpoint) as (_, front):
        assert front.client.complete("O wind", 3, ignore_eos=True).completion_tokens == 3
        with pytest.raises(UserError, match="pregate decouple"):
            front.client.route("O wind")


@pytest.mark.parametrize(
    ("error", "sentence", "prompt", "options"),
    [
        (UserError, "max_tokens 0: must be at least 1", "x", {"max_tokens": 0}),
        (UserError, "max_tokens -1: must be at least 1", "x", {"max_tokens": -1}),
        (
            UserError,
            "max_tokens 253: with a prompt of 4 tokens exceeds the context of 256; allowed: 1 to 252",
            [5] * 4,
            {"max_tokens": 253},
        ),
        (UserError, r"temperature -1.0: must be 0 \(greedy\)", "x", {"temperature": -1.0}),
        (UserError, "top_p 0.0: must be above 0", "x", {"top_p": 0.0}),
        (UserError, "top_p 1.5: must be above 0", "x", {"top_p": 1.5}),
        (UserError, "prompt of 256 tokens: longer than the context of 256", [5] * 256, {}),
        (UserError, "prompt of 0 tokens: must hold", [], {}),
        (UserError, "prompt token id 512: must be 0 to 511", [512], {}),
        (UserError, "prompt of 30000 bytes: longer than 255 tokens can hold", "word, " * 5000, {}),
        (UserError, "prompt of bytes: must be text or a list of token ids", b"abc", {}),
        (UserError, "prompt token id in a list: must be a whole number", ["a"], {}),
        (UserError, "prompt token id -1: must be 0 to", [-1], {}),
        (UserError, "stop_token_ids 512: must be 0 to 511", "x", {"stop_token_ids": [3, 512]}),
        (UserError, "stop_token_ids -1: must be 0 to", "x", {"stop_token_ids": [-1]}),
        (UserError, "request_id: must match", "x", {"request_id": "a\nb"}),
        (NotFoundError, "model other: is not served here; allowed: tiny", "x", {"model": "other"}),
    ],
)
def test_bad_input_is_refused_with_the_sentence_of_the_command_line(client, error, sentence, prompt, options):
    with pytest.raises(error, match=sentence) as caught:
        client.complete(prompt, **options)
    assert type(caught.value) is error
    assert idle(client)


def test_who_names_no_max_tokens_gets_what_the_context_leaves(client):
    done = client.complete([5] * 250, ignore_eos=True)
    assert (done.completion_tokens, done.finish_reason) == (6, "length")
    assert client.complete([5] * 250, 6, ignore_eos=True).token_ids == done.token_ids
    assert client.complete([5] * 4, ignore_eos=True).completion_tokens == 64


def test_no_prompt_at_all_is_invalid(front):
    with pytest.raises(grpc.RpcError) as error:
        list(front[1].stub.Generate(pb.GenerateRequest(), timeout=10))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.details() == "prompt: missing; give text, tokenized or chat"


@pytest.mark.parametrize("method", ["Generate", "Route", "GetModelInfo"])
def test_a_message_that_cannot_be_decoded_is_invalid(front, method):
    with grpc.insecure_channel(front[1].target) as channel:
        error = error_of(channel.unary_stream(f"/pregate.v1.Pregate/{method}")(b"\xff\xff\xff", timeout=10))
    assert error is not None
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "cannot be decoded" in str(error.details())


def test_a_message_too_large_for_the_server_is_not_worth_another_try(front, client):
    text = "word " * 2_000_000
    stream = client.generate("O wind", 100, ignore_eos=True)
    next(stream)
    with pytest.raises(UserError, match="larger than max"):
        client.complete(text, 1)
    assert len(list(stream)) > 0
    with Client(front[1].target, token="x" * 100_000) as long_winded, pytest.raises(UserError, match="exceeds hard"):
        long_winded.loads()


class NoTokenizer:
    def encode(self, text):
        raise AssertionError("tokenised")

    encode_batch = encode


def test_a_text_far_too_long_is_refused_before_it_is_tokenised(front, client, monkeypatch):
    monkeypatch.setattr(front[1].service, "_tokenizer", NoTokenizer())
    for method in (client.complete, client.route):
        with pytest.raises(UserError, match=r"prompt of 3000000 bytes: longer than 25[56] tokens can hold"):
            method("word, " * 500_000)


def test_a_text_is_tokenised_without_holding_up_the_event_loop(front):
    loop, service = front[1].loop, front[1].service

    async def ticks_meanwhile():
        task, ticks = asyncio.ensure_future(service._prompts._encode_aside("word, " * 100_000)), 0
        while not task.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return ticks, len(task.result())

    ticks, num_tokens = loop.call(ticks_meanwhile())
    assert num_tokens > 100_000
    assert ticks > 10, "`encode` holds Python's lock to its end"


def test_more_calls_at_once_than_grpc_holds_end_with_a_reason(front):
    """gRPC keeps 1,000 calls that nobody has accepted yet; above it ends them with a bare CANCELLED."""
    door, codes = front[1], []
    request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[512]))
    door.loop.loop.call_soon_threadsafe(time.sleep, 1.0)
    calls = [door.stub.Generate(request, timeout=60) for _ in range(3500)]
    for call in calls:
        error = error_of(call)
        codes.append(None if error is None else error.code().name)
    assert set(codes) <= {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}, {code: codes.count(code) for code in set(codes)}


def test_a_proxy_of_the_environment_is_no_way_to_this_machine(front, monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    port = front[1].target.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost"):
        with Client(f"{host}:{port}", timeout_s=20) as client:
            assert client.model_info().vocab_size == 512


def test_model_info_says_how_the_engine_is(client):
    client.complete("O wind", 2, ignore_eos=True)
    info = client.model_info()
    assert (info.unavailable, info.busy_with, info.busy_s) == ("", "", 0)
    assert info.num_steps > 0


def test_full_queue_says_when_to_come_again(checkpoint):
    with served(checkpoint, max_running=1, max_queued=1) as (engine, front):
        slow_steps(engine, 0.005)
        request = pb.GenerateRequest(text="O wind", sampling_params=pb.SamplingParams(max_tokens=50, ignore_eos=True))
        calls = [front.stub.Generate(request, timeout=60) for _ in range(8)]
        errors = [error for error in map(error_of, calls) if error is not None]
        assert 1 <= len(errors) < len(calls)  # one runs, one waits, and who comes late finds room
        for error in errors:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert ("retry-after", "1") in list(error.trailing_metadata() or ())
        streams = [front.client.generate("O wind", 50, ignore_eos=True) for _ in range(8)]
        with pytest.raises(QueueFullError):
            [list(stream) for stream in streams]
        wait_for(lambda: idle(front.client), what="an idle engine")
        assert not engine.has_work


def error_of(call):
    try:
        list(call)
    except grpc.RpcError as error:
        return error
    return None


def steps_of(engine):
    return engine.info()["num_steps"]


@pytest.mark.parametrize("leave", ["cancel", "disconnect", "deadline"])
def test_a_caller_who_leaves_frees_the_engine(checkpoint, leave):
    with served(checkpoint) as (engine, front), Client(front.target, timeout_s=60, retry_s=0) as other:
        slow_steps(engine, 0.01)
        before = steps_of(engine)
        if leave == "deadline":
            with Client(front.target, timeout_s=0.3) as hasty, pytest.raises(DeadlineError):
                hasty.complete("O wind", 200, ignore_eos=True)
        else:
            stream = other.generate("O wind", 200, ignore_eos=True)
            next(stream)
            stream.cancel() if leave == "cancel" else other.close()
        wait_for(lambda: not engine.has_work, 20, "an idle engine")
        assert steps_of(engine) - before < 150, "it ended by the cancel, not because it was done"
        assert front.client.complete("O wind", 2, ignore_eos=True).completion_tokens == 2


def test_stop_lets_the_running_end_and_refuses_the_new(checkpoint):
    with served(checkpoint) as (engine, front), Client(front.target, timeout_s=60, retry_s=0) as late:
        slow_steps(engine, 0.01)
        stream = front.client.generate("O wind", 100, ignore_eos=True)
        next(stream)
        assert late.health()
        stopping = front.loop.loop.call_soon_threadsafe(
            lambda: front.loop.loop.create_task(front.server.stop(grace_s=30))
        )
        assert stopping is not None
        assert wait_for(lambda: not late.health("pregate.v1.Pregate"), 5) < 1
        with pytest.raises(UnavailableError, match="draining"):
            late.complete("O wind", 2)
        list(stream)
        assert stream.completion is not None
        assert stream.completion.completion_tokens == 100


def test_stop_ends_what_outlasts_the_grace_with_unavailable(checkpoint):
    with served(checkpoint) as (engine, front):
        slow_steps(engine, 0.05)
        stream = front.client.generate("O wind", 200, ignore_eos=True)
        next(stream)
        front.stop(grace_s=0.2)
        with pytest.raises(UnavailableError, match="closing"):
            list(stream)
        wait_for(lambda: not engine.has_work, 20, "an idle engine")


@pytest.mark.slow
def test_streams_outlive_a_lost_host_and_wait_while_there_is_none(checkpoint):
    """A host that is stopped cannot be told from a dead one."""
    with served(checkpoint, num_hosts=2) as (engine, front):
        wanted = [front.client.complete(p, 80, ignore_eos=True).token_ids for p in PROMPTS[:3]]
        slow_steps(engine, 0.1)
        generations = [front.client.generate(p, 80, ignore_eos=True) for p in PROMPTS[:3]]
        for generation in generations:
            next(generation)
        hosts = [host.pid for host in multiprocessing.active_children() if host.pid is not None]
        try:
            os.kill(hosts[0], signal.SIGSTOP)
            wait_for(lambda: engine.exchange.lost, 20, "a host that is given up")
            assert front.client.health(), "the other one serves"
            os.kill(hosts[1], signal.SIGSTOP)
            wait_for(lambda: not front.client.health(), 20, "NOT_SERVING")
            with pytest.raises(UnavailableError, match=r"expert host [01] is lost"):
                front.client.complete("O wind", 2)
            assert engine.has_work
        finally:
            for host in hosts:
                os.kill(host, signal.SIGCONT)
        vars(engine).pop("step")  # as fast as it goes
        for generation, token_ids in zip(generations, wanted, strict=True):
            list(generation)
            assert generation.completion is not None and generation.completion.token_ids == token_ids
        wait_for(lambda: front.client.health() and not engine.exchange.lost, 20, "both hosts back")
        assert not engine.has_work


def _engine_process(checkpoint, endpoint):
    with local_engine(checkpoint) as engine:
        slow_steps(engine, 0.05)
        with engine_thread(engine, endpoint) as stop:
            stop.wait(120)  # until it is killed


@pytest.mark.slow
def test_a_killed_engine_is_noticed_and_its_successor_found(checkpoint):
    with socket_folder() as folder:
        endpoint = f"ipc://{folder}/engine.sock"
        processes = [
            PROCESSES.Process(target=_engine_process, args=(checkpoint, endpoint), daemon=True) for _ in range(2)
        ]
        processes[0].start()
        with door(endpoint, checkpoint) as front:
            assert not front.client.health()
            wait_for(front.client.health, 60, "health")
            stream = front.client.generate("O wind", 250, ignore_eos=True)
            next(stream)
            start_s = time.monotonic()
            processes[0].kill()
            with pytest.raises(UnavailableError, match="silent for"):
                list(stream)
            wait_for(lambda: not front.client.health(), what="NOT_SERVING")
            assert time.monotonic() - start_s < 10
            with pytest.raises(UnavailableError, match="silent for"):
                front.client.complete("O wind", 2)
            processes[1].start()
            wait_for(front.client.health, 60, "health")
            assert front.client.complete("O wind", 2, ignore_eos=True).completion_tokens == 2
        processes[1].kill()
        for process in processes:
            process.join(30)
