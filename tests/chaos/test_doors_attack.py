"""Clients that vanish, cancel and talk nonsense at the doors: nothing ends, hangs, leaks or grows.

A small part of each by default; with PREGATE_CHAOS_KILLS set 1,000 clients, 1,000 cancels and 100,000 messages a wire.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import aiohttp
import grpc
import httpx

from pregate.client.proto import pregate_pb2 as pb
from tests.chaos.attacked import (
    FINE,
    NUM_CLIENTS,
    NUM_MESSAGES,
    PROMPT,
    ROOT,
    TEXT,
    TOGETHER,
    in_parallel,
    under_attack,
)
from tests.chaos.mutations import mutate_bytes, mutate_proto, mutate_value


def test_clients_that_vanish(target):
    """Their process is killed while they stream: nobody says goodbye. The first fifth fills allocators and caches."""
    num_rounds = -(-NUM_CLIENTS // TOGETHER)
    with under_attack(target, f"{NUM_CLIENTS} clients vanish") as settled:
        for number in range(num_rounds):
            if number == num_rounds // 5:
                settled()
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

    asyncio.run(attack())  # the first thousand leave 39 MB, a third one 5
    with under_attack(target, f"{NUM_CLIENTS} cancels"):
        asyncio.run(attack())


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

            await in_parallel(NUM_MESSAGES // 10, 8, one)
            settled()
            await in_parallel(NUM_MESSAGES - NUM_MESSAGES // 10, 8, one)

    with under_attack(target, f"{NUM_MESSAGES} messages over HTTP") as settled:
        asyncio.run(attack())
