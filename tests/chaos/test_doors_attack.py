"""Clients that vanish, cancel and talk nonsense, on every wire: nothing ends, hangs, leaks or grows.

A small part of each by default; with PREGATE_CHAOS_KILLS set 1,000 clients, 1,000 cancels and 100,000 messages a wire.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import httpx
import numpy as np
import psutil
import pytest
import zmq

from pregate import Client
from pregate.base.completion import TokenLogprob
from pregate.base.errors import ProtocolError
from pregate.client.proto import pregate_pb2 as pb
from pregate.router.link import messages as link
from pregate.router.link.packet import pack, unpack
from pregate.workers.link import protocol as channel
from pregate.workers.link import transport
from pregate.workers.link.wire import decode, encode
from tests.chaos.mutations import mutate_bytes, mutate_frames, mutate_packet, mutate_proto, mutate_value
from tests.router.running import socket_folder, wait_for

ROOT = Path(__file__).resolve().parents[2]
WHOLE = "PREGATE_CHAOS_KILLS" in os.environ
RESULTS = os.environ.get("PREGATE_CHAOS_RESULTS")
NUM_CLIENTS, NUM_MESSAGES = (1000, 100_000) if WHOLE else (20, 300)
#: Clients in a process that is killed: as many as may run and wait.
TOGETHER = 40
#: Memory that an attack may leave: what allocators and caches keep. A leak of 1 KB a message would be 100 MB.
MOST_GROWTH = 48 << 20
PROMPT, TEXT = [1, 40, 41, 42], "O wind that walks"
FINE = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}


@dataclass
class Target:
    """The process that is attacked. `told`: what its wires answered, by name."""

    process: subprocess.Popen
    where: dict[str, Any]
    log: Path
    client: Client
    told: Counter = field(default_factory=Counter)

    @property
    def rss(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def text(self) -> tuple[int, ...]:
        return self.client.complete(PROMPT, 8, ignore_eos=True).token_ids

    def is_idle(self) -> bool:
        loads = self.client.loads()
        waiting = loads.num_running + loads.num_queued + loads.num_waiting_for_paths + loads.num_requests
        metrics = httpx.get(f"http://127.0.0.1:{self.where['http']}/metrics", timeout=20).text
        at_door = [line for line in metrics.splitlines() if line.startswith("pregate_num_requests_at_door{")]
        return not waiting and loads.kv_blocks_free == loads.kv_blocks and at_door[0].endswith(" 0.0")


@pytest.fixture(scope="module")
def target(tiny_path_checkpoint, tmp_path_factory) -> Iterator[Target]:
    log = tmp_path_factory.mktemp("attack") / "log"
    with socket_folder() as folder, log.open("w") as errors:
        command = [sys.executable, "-m", "tests.chaos.doors_process", str(tiny_path_checkpoint), str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            where = json.loads(line)
            with Client(f"127.0.0.1:{where['grpc']}", timeout_s=60, retry_s=20) as client:
                yield Target(process, where, log, client)
        finally:
            process.kill()
            process.wait(20)


@contextmanager
def under_attack(target: Target, name: str) -> Iterator[None]:
    """What must hold after an attack as before it; prints what it came to."""
    expected, before, start_s = target.text(), target.rss, time.monotonic()
    target.told.clear()
    yield
    took_s = time.monotonic() - start_s
    wait_for(target.is_idle, 60, f"an idle engine after {name}")
    assert target.process.poll() is None
    assert target.text() == expected
    grown, log = target.rss - before, target.log.read_text()
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:4000]
    print(f"\n{name}: {took_s:.1f} s, {grown / 1e6:+.1f} MB, answers {dict(target.told)}")
    if RESULTS:
        path = Path(RESULTS)
        found = json.loads(path.read_text()) if path.exists() else {}
        found[name] = {"seconds": took_s, "grown_bytes": grown, "answers": dict(target.told)}
        path.write_text(json.dumps(found, indent=1) + "\n")
    assert grown < MOST_GROWTH, f"{name}: {grown / 1e6:.0f} MB"


async def in_parallel(num: int, width: int, one: Callable[[int], Awaitable[None]]) -> None:
    """Call `one` with 0 to `num`, `width` at once."""
    numbers = iter(range(num))

    async def work() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(work() for _ in range(width)))


# ---- clients that leave ----


def test_clients_that_vanish(target):
    """Their process is killed while they stream: nobody says goodbye."""
    with under_attack(target, f"{NUM_CLIENTS} clients vanish"):
        for _ in range(-(-NUM_CLIENTS // TOGETHER)):
            num = min(TOGETHER, NUM_CLIENTS)
            ports = str(target.where["grpc"]), str(target.where["http"])
            command = [sys.executable, "-m", "tests.chaos.vanishing_clients", *ports, str(num)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            for _ in range(num // 2):  # the others have begun, wait or stream
                assert process.stdout.readline(), "a client ended early"
            process.kill()
            process.wait(20)
            target.told["vanished"] += num


def test_cancels(target):
    """By the call's own, by closing the connection and by Abort, before the first token and after."""

    async def attack() -> None:
        address = f"127.0.0.1:{target.where['grpc']}"
        async with grpc.aio.insecure_channel(address) as wire, httpx.AsyncClient(timeout=60) as http:
            generate = wire.unary_stream("/pregate.v1.Pregate/Generate")
            abort = wire.unary_unary("/pregate.v1.Pregate/Abort")

            async def over_grpc(number: int) -> None:
                sampling = pb.SamplingParams(max_tokens=200, ignore_eos=True, n=1 + number % 3)
                request = pb.GenerateRequest(request_id=f"r{number}", text=TEXT, sampling_params=sampling, stream=True)
                call = generate(request.SerializeToString())
                if number % 4 == 0:
                    await asyncio.sleep(random.random() / 20)
                else:
                    await call.read()
                if number % 4 == 1:
                    await abort(pb.AbortRequest(request_ids=[f"r{number}"]).SerializeToString())
                    while await call.read() is not grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
                        pass
                else:
                    call.cancel()

            async def over_http(number: int) -> None:
                body = {"prompt": TEXT, "max_tokens": 200, "ignore_eos": True, "stream": number % 4 != 2}
                url = f"http://127.0.0.1:{target.where['http']}/v1/completions"
                with suppress(asyncio.TimeoutError, httpx.TimeoutException):
                    async with http.stream("POST", url, json=body, timeout=0.2 if number % 4 == 2 else 60) as answer:
                        async for _ in answer.aiter_bytes():
                            break

            async def one(number: int) -> None:
                await (over_grpc if number % 2 else over_http)(number // 2)
                target.told["cancelled"] += 1

            await in_parallel(NUM_CLIENTS, 16, one)

    with under_attack(target, f"{NUM_CLIENTS} cancels"):
        asyncio.run(attack())


# ---- nonsense ----


def requests_of_grpc() -> dict[str, Any]:
    sampling = pb.SamplingParams(max_tokens=2, temperature=0.5, seed=3, stop=["x"], logprobs=1, logit_bias={5: 1.0})
    generate = pb.GenerateRequest(text=TEXT, sampling_params=sampling, stream=True, request_id="a", priority=1)
    resumed = pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=PROMPT), sampling_params=pb.SamplingParams(max_tokens=9), resumes=True,
        generated_ids=[5, 6],
    )  # fmt: skip
    chat = pb.GenerateRequest(chat=pb.ChatInput(messages=[pb.ChatMessage(role="user", content="x")]))
    route = pb.RouteRequest(text=TEXT)
    abort = pb.AbortRequest(request_ids=["a", "b"])
    return {
        "Generate": (generate, resumed, chat),
        "Route": (route, pb.RouteRequest(tokenized=pb.TokenizedInput(input_ids=PROMPT))),
        "Abort": (abort,),
        "GetModelInfo": (pb.GetModelInfoRequest(model="tiny"),),
        "GetLoads": (pb.GetLoadsRequest(),),
    }


def test_nonsense_over_grpc(target):
    rng, requests = random.Random(1), requests_of_grpc()

    async def attack() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{target.where['grpc']}") as wire:
            calls = {name: wire.unary_stream(f"/pregate.v1.Pregate/{name}") for name in (*requests, "None")}

            async def one(number: int) -> None:
                name = rng.choices([*requests], [6, 2, 1, 1, 1])[0]
                message = mutate_proto(rng.choice(requests[name]), rng)
                call = calls[name](message, timeout=60)
                with suppress(grpc.aio.AioRpcError):
                    async for _ in call:
                        pass
                code = (await call.code()).name
                assert code in FINE, (name, message, await call.details())
                target.told[code] += 1

            await in_parallel(NUM_MESSAGES, 16, one)

    with under_attack(target, f"{NUM_MESSAGES} messages over gRPC"):
        asyncio.run(attack())


BODIES: Sequence[tuple[str, dict[str, Any]]] = (
    ("/v1/completions", {
        "model": "tiny", "prompt": TEXT, "max_tokens": 2, "temperature": 0.5, "seed": 1, "stop": ["x"], "logprobs": 1,
        "stream": False, "n": 1, "logit_bias": {"5": 1}, "echo": False, "top_p": 0.9, "min_tokens": 1,
    }),
    ("/v1/completions", {
        "prompt": [PROMPT, PROMPT], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True},
    }),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "max_tokens": 2,
    }),
    ("/tokenize", {"prompt": TEXT, "add_special_tokens": True, "return_token_strs": True}),
    ("/detokenize", {"tokens": PROMPT}),
    ("/v1/route", {"prompt": TEXT}),
)  # fmt: skip


def test_nonsense_over_http(target):
    """Bodies that are nearly right, bytes that are no JSON, and bytes that are no HTTP."""
    rng, url = random.Random(2), f"http://127.0.0.1:{target.where['http']}"
    words = [None, True, 0, -1, 2**31, 2**64, 1.5, -1e308, "", "x", "\x00", "ü", [], [[]], {}, [1], ["a"]]

    async def raw(data: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", target.where["http"])
        try:
            writer.write(data)
            writer.write_eof()
            await asyncio.wait_for(reader.read(1 << 20), 60)
        except (ConnectionError, OSError):
            pass
        finally:
            writer.close()
        target.told["raw"] += 1

    async def attack() -> None:
        async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(60)) as http:

            async def one(number: int) -> None:
                path, body = rng.choice(BODIES)
                text = json.dumps(mutate_value(body, rng, words) if rng.random() < 0.8 else body)
                data = text.encode() if rng.random() < 0.85 else mutate_bytes(text.encode(), rng)
                if rng.random() < 0.05:
                    head = (
                        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
                    )
                    await raw(mutate_bytes(head.encode() + data, rng))
                    return
                async with http.post(path, data=data, headers={"Content-Type": "application/json"}) as answer:
                    said = await answer.text()
                assert answer.status in {200, 400, 404, 413, 422, 429, 503, 504}, (path, data, said)
                assert "internal error" not in said, (path, data, said)
                target.told[str(answer.status)] += 1

            await in_parallel(NUM_MESSAGES, 8, one)

    with under_attack(target, f"{NUM_MESSAGES} messages over HTTP"):
        asyncio.run(attack())


SAMPLING = link.SamplingParams(2, 0.5, 0.9, 7, (3,), logit_bias=((5, 1.0),), logprobs=1, stop=("x",))
TO_ENGINE: Sequence[link.Message] = (
    link.SubmitRequest("a", (1, 40, 41), SAMPLING, 20.0, "salt"),
    link.SubmitRequest("b", (1, 40, 41), link.SamplingParams(3), num_generated=1),
    link.CancelRequest("a"),
    link.RouteRequest("c", (1, 40, 41), 20.0, True),
    link.InfoRequest("d"),
    link.KeepAlive("door", ("a", "b")),
)
TO_DOOR: Sequence[link.Message] = (
    link.Heartbeat("e", 3, "a step", 0.1, None),
    link.TokensEvent("a", (5, 6), (TokenLogprob(5, -0.5, ((6, -1.0),)),)),
    link.FinishedEvent("a", "stop", 3, 2, (4, 5), 1, 2, 0.5),
    link.FailedEvent("a", "UNAVAILABLE", "no"),
    link.InfoReply("d", {"vocab_size": 512, "hosts": []}),
)


@pytest.mark.parametrize("wire", ["engine", "paths"])
def test_nonsense_on_the_link(target, wire):
    """To the engine, and to the path service, which speaks the same."""
    rng = random.Random(3)
    with under_attack(target, f"{NUM_MESSAGES} messages to the {wire}"), zmq_context() as context:
        socket = context.socket(zmq.DEALER)
        socket.connect(target.where[wire])
        for number in range(NUM_MESSAGES):
            given = [rng.choice(TO_ENGINE) for _ in range(rng.choice([1, 1, 1, 3]))]
            packet = mutate_packet(pack(given), rng)
            assert socket.poll(60_000, zmq.POLLOUT), "it reads no more"
            socket.send_multipart([packet] if rng.random() < 0.98 else [packet, b"", packet])
            if number % 100 == 99:
                ask(socket, target, f"q{number}")
        ask(socket, target, "the last")


def ask(socket: zmq.Socket, target: Target, name: str) -> None:
    """Wait until everything sent before has been read: until a valid question is answered."""
    socket.send(pack([link.InfoRequest(name)]))
    while True:
        assert socket.poll(60_000), f"no answer to {name}"
        for message in unpack(socket.recv()):
            target.told[type(message).__name__] += 1
            if isinstance(message, link.InfoReply) and message.request_id == name:
                return


def to_host(engine: str, fingerprint: str, width: int) -> list[channel.Message]:
    key = channel.GroupKey(engine, 1, 0, 0)
    index = channel.GroupIndex(*(np.array(a, np.int32) for a in ([1, 4], [2, 2], [0, 2, 0, 1])))
    rows = channel.Rows("float32", (3, width), b"\0" * (12 * width))
    arrays = ([3, 3, 0], [0, 2, 4, 4], [1, 4, 1, 4], [2, 2, 2, 2], [0, 4, 8, 8], [0, 2, 0, 1, 0, 2, 0, 1])
    plan = channel.HostPlan(1, *(np.array(a, np.int32) for a in arrays))
    expected = channel.Expected(2, np.ones((2, 3, 6), bool), np.zeros((3, 6), bool))
    return [
        channel.Hello(engine, fingerprint, "float32", width, 64),
        channel.Bye(engine),
        channel.PlanMessage(engine, plan),
        channel.ExpectedMessage(engine, expected),
        channel.GroupMessage(key, rows, None),
        channel.GroupMessage(key, rows, index),
    ]


def test_nonsense_to_an_expert_host(target):
    """On both of its sockets, by an engine that it has greeted; it greets it anew, and serves the real one."""
    rng, given = random.Random(4), to_host("attacker", target.where["fingerprint"], 64)
    frames = [[bytes(frame) for frame in encode(message)] for message in given]
    with under_attack(target, f"{NUM_MESSAGES} messages to a host"), zmq_context() as context:
        sockets = []
        for name, wire in ((transport.control_id(b"attacker"), "host"), (transport.data_id(b"attacker"), "data")):
            sockets.append(context.socket(zmq.DEALER))
            sockets[-1].setsockopt(zmq.ROUTING_ID, name)
            sockets[-1].connect(target.where[wire])
        greet(sockets, given, 0, target)
        for number in range(NUM_MESSAGES):
            socket = sockets[rng.random() < 0.8]
            assert socket.poll(60_000, zmq.POLLOUT), "it reads no more"
            socket.send_multipart(mutate_frames(rng.choice(frames), rng))
            if number % 100 == 99:
                greet(sockets, given, number, target)


def greet(sockets: Sequence[zmq.Socket], given: Sequence[Any], number: int, target: Target) -> None:
    """A valid greeting is answered, and then a valid group, after all that came before; each is known by a number."""
    control, data = sockets
    hello = replace(given[0], max_rows=4 + number // 100 % 60)
    control.send_multipart(encode(hello))
    until(control, lambda m: isinstance(m, channel.HelloAck) and m.max_rows == hello.max_rows, target)
    group = replace(given[-1], key=given[-1].key._replace(step=1 << 40 | number))
    data.send_multipart(encode(group))
    until(data, lambda m: isinstance(m, channel.RowsMessage) and m.key == group.key, target)


def until(socket: zmq.Socket, wanted: Callable[[Any], bool], target: Target) -> None:
    give_up_s = time.monotonic() + 60
    while True:
        assert time.monotonic() < give_up_s and socket.poll(60_000), "no answer"
        message = decode(socket.recv_multipart())
        target.told[type(message).__name__] += 1
        if wanted(message):
            return


@contextmanager
def zmq_context() -> Iterator[zmq.Context]:
    """Whose end waits for nobody."""
    context = zmq.Context()
    try:
        yield context
    finally:
        context.destroy(linger=0)


def test_nonsense_is_a_protocol_error_on_either_side():
    """What doors, engine and hosts read, of every kind: nothing else is ever raised."""
    rng, told = random.Random(5), Counter()
    index = channel.RowsMessage(channel.GroupKey("e", 1, 0, 0), "i", channel.Rows("float32", (2, 2), b"\0" * 16))
    beat = channel.Heartbeat("i", 3, "x", 0.5, channel.CacheCounters(1, 2, 3))
    others = [index, beat, channel.NeedPlan(index.key, "i"), channel.Failure(None, "i", "INTERNAL", "x")]
    frames = [[bytes(f) for f in encode(message)] for message in (*to_host("e", "f", 4), *others)]
    for _ in range(NUM_MESSAGES):
        attempts: list[tuple[Callable[[Any], object], object]] = [
            (unpack, mutate_packet(pack([rng.choice((*TO_ENGINE, *TO_DOOR))]), rng)),
            (decode, mutate_frames(rng.choice(frames), rng)),
        ]
        for read, data in attempts:
            try:
                read(data)
                told["read"] += 1
            except ProtocolError:
                told["refused"] += 1
    print(dict(told))
    assert min(told.values()) > NUM_MESSAGES // 100
