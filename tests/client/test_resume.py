"""A client whose door dies in mid-stream goes on elsewhere; the text shows nothing of it. Real doors, one engine."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pregate import AsyncClient, Client
from pregate.base.errors import DeadlineError, UnavailableError
from tests.router.running import door, engine_thread, local_engine, slow_steps, socket_folder, wait_for

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "The harbour lay quiet"
OPTIONS = {
    "greedy": {"ignore_eos": True},
    "drawn": {"temperature": 1.0, "seed": 5, "ignore_eos": True, "frequency_penalty": 1.0, "logprobs": 1},
    "several": {"temperature": 1.0, "seed": 5, "ignore_eos": True, "n": 2},
    "one answer": {"ignore_eos": True, "stream": False},
}


@pytest.fixture(scope="module")
def engine(tiny_path_checkpoint):
    """(its endpoint, its tokenizer's folder, itself)"""
    with local_engine(tiny_path_checkpoint) as engine, socket_folder() as folder:
        slow_steps(engine, 0.01)
        endpoint = f"ipc://{folder}/engine.sock"
        with engine_thread(engine, endpoint):
            yield endpoint, tiny_path_checkpoint, engine


class DoorProcess:
    """A door in a process of its own; it does not load torch, and so is there soon."""

    def __init__(self, engine, port=0):
        command = [sys.executable, str(Path(__file__).with_name("door_process.py")), *map(str, engine[:2]), str(port)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        self.port = self.process.stdout.readline().strip()
        self.target = f"127.0.0.1:{self.port}"

    def kill(self):
        self.process.kill()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def second(engine):
    """The target of a door that stays."""
    one = DoorProcess(engine)
    yield one.target
    one.kill()


@pytest.fixture
def first(engine):
    """A door to be killed."""
    one = DoorProcess(engine)
    yield one
    one.kill()


def pieces(chunks):
    """Per completion what its chunks say, joined."""
    found = {}
    for chunk in chunks:
        text, ids, logprobs = found.get(chunk.index, ("", (), ()))
        found[chunk.index] = (
            text + chunk.text,
            ids + chunk.token_ids,
            logprobs + tuple(t.token_id for t in chunk.logprobs),
        )
    return found


def told(completions):
    """What must not depend on a break."""
    said = [(c.index, c.text, c.token_ids, c.finish_reason, c.completion_tokens, len(c.logprobs)) for c in completions]
    return sorted(said)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_stream_whose_door_is_killed_goes_on_at_another(engine, first, second, name):
    with Client([first.target, second], timeout_s=60) as client:
        whole = client.generate(PROMPT, 40, **OPTIONS[name])
        expected = pieces(whole)
        call = client.generate(PROMPT, 40, **OPTIONS[name])
        if name == "one answer":
            wait_for(lambda: client.loads().num_requests, what="the request")
            chunks = []
        else:
            chunks = [next(call) for _ in range(5)]
        first.kill()
        chunks += call
        assert pieces(chunks) == expected
        assert told(call.completions) == told(whole.completions)
        assert client.model_info().model == "tiny"
    wait_for(lambda: not engine[2].has_work, what="an idle engine")


def test_a_stream_goes_on_where_it_was_when_the_door_is_back(engine, first):
    with Client(first.target, timeout_s=60, retry_s=30) as client:
        expected = client.complete(PROMPT, 40, ignore_eos=True)
        call = client.generate(PROMPT, 40, ignore_eos=True)
        text = next(call).text
        first.kill()
        again = DoorProcess(engine, first.port)
        text += "".join(chunk.text for chunk in call)
        again.kill()
        assert text == expected.text == call.completion.text


def test_a_draining_door_is_left_for_another(engine, second):
    with (
        door(*engine[:2], engine_first=True) as draining,
        Client([draining.target, second], timeout_s=60) as client,
    ):
        expected = client.complete(PROMPT, 40, ignore_eos=True)
        call = client.generate(PROMPT, 40, ignore_eos=True)
        text = next(call).text
        draining.stop(grace_s=0.1)
        assert text + "".join(chunk.text for chunk in call) == expected.text
        assert client.complete(PROMPT, 3, ignore_eos=True).token_ids == expected.token_ids[:3]


@pytest.mark.parametrize("name", ["greedy", "drawn"])
def test_the_async_client_goes_on_too(first, second, name):
    async def run(targets, kill):
        async with AsyncClient(targets, timeout_s=60) as client:
            whole = client.generate(PROMPT, 40, **OPTIONS[name])
            expected = [chunk async for chunk in whole]
            call = client.generate(PROMPT, 40, **OPTIONS[name])
            chunks = [await anext(call) for _ in range(5)]
            await asyncio.to_thread(kill)
            chunks += [chunk async for chunk in call]
            assert pieces(chunks) == pieces(expected)
            assert told(call.completions) == told(whole.completions)
            assert (await client.loads()).num_requests == 0

    asyncio.run(run([first.target, second], first.kill))


@pytest.mark.parametrize(
    ("options", "least_s", "most_s"),
    [({"retry_s": 1.0}, 0.3, 5), ({"retry_s": 60.0, "timeout_s": 1.5}, 0.1, 5), ({"retry_s": 0}, 0, 0.5)],
)
def test_trying_again_ends_after_its_time_and_with_the_deadline(first, options, least_s, most_s):
    with Client(first.target, **{"timeout_s": 60, **options}) as client:
        call = client.generate(PROMPT, 200, ignore_eos=True)
        next(call)
        first.kill()
        start_s = time.monotonic()
        with pytest.raises((UnavailableError, DeadlineError)):
            list(call)
        assert least_s <= time.monotonic() - start_s < most_s


def test_a_cancelled_one_is_not_tried_again(first, second):
    with Client([first.target, second], timeout_s=60) as client:
        call = client.generate(PROMPT, 200, ignore_eos=True)
        next(call)
        call.cancel()
        first.kill()
        assert list(call) == []
        assert client.loads().num_requests == 0
