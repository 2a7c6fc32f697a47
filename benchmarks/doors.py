"""What the doors add: the same texts through the service alone, through gRPC, and through Ray Serve's HTTP.

    python -m benchmarks.doors --model examples/quartet-paths --rounds 15 [--haproxy]

One deployment, one client process, contenders in turn. The service is what stands behind every door (it asks the path
service and the engine, and makes text); called in the client's own process it has no wire. Bare gRPC asks a grpc.aio
server in a process of its own, which answers at once with as many messages: what gRPC itself takes, as idle as the
others were. `--haproxy`: HAProxy stands before Serve's replicas instead of Serve's own proxy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import grpc.aio
import numpy as np

from benchmarks.http_app import http_app
from benchmarks.surroundings import sentence, surroundings
from pregate.base.completion import Chunk
from pregate.cli.load.targets import Target, opened
from pregate.router.doors.connect import connect_service
from pregate.router.doors.service import DoorService
from pregate.router.link.messages import SamplingParams
from tests.cluster.leftovers import Running, serving

RESULTS = Path(__file__).parent / "results" / "doors"
SERVICE = "service, no wire"
BARE = "bare gRPC, no service"
#: A server that sends as many messages of twenty bytes as the four bytes it is sent say.
_ECHO = """
import asyncio, grpc, grpc.aio
async def answer(asked, context):
    for _ in range(int.from_bytes(asked[-4:], "little")):
        await context.write(bytes(20))
async def main():
    server, same = grpc.aio.server(), lambda message: message
    handler = grpc.unary_stream_rpc_method_handler(answer, same, same)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", {"Ask": handler}),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()
asyncio.run(main())
"""


class ServiceTarget:
    """The service in this process, as a `Target`."""

    def __init__(self, service: DoorService) -> None:
        self._service = service

    async def info(self) -> dict[str, Any]:
        return await self._service.model_info()

    async def generate(self, prompt_ids: Sequence[int], num_tokens: int, timeout_s: float) -> AsyncGenerator[int, None]:
        sampling = SamplingParams(num_tokens, ignore_eos=True)
        async for item in self._service.generate(prompt_ids, sampling, deadline_s=timeout_s):
            if isinstance(item, Chunk) and item.token_ids:
                yield len(item.token_ids)


class BareTarget:
    """gRPC and nothing behind it, as a `Target`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        same = bytes
        self._ask = channel.unary_stream("/bare.Bare/Ask", request_serializer=same, response_deserializer=same)

    async def info(self) -> dict[str, Any]:
        return {}

    async def generate(self, prompt_ids: Sequence[int], num_tokens: int, timeout_s: float) -> AsyncGenerator[int, None]:
        asked = np.asarray(prompt_ids, np.int32).tobytes() + num_tokens.to_bytes(4, "little")
        async for _ in self._ask(asked, timeout=timeout_s):
            yield 1


@contextmanager
def bare_server() -> Iterator[str]:
    """Where a server that only answers listens, until the block ends."""
    with subprocess.Popen([sys.executable, "-c", _ECHO], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


async def burst(target: Target, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[float, float]:
    """Ask all prompts at once; returns the median seconds to the first token, and tokens a second of all."""
    begun_s, first_s, num_seen = time.perf_counter(), [], 0

    async def one(prompt: Sequence[int]) -> None:
        nonlocal num_seen
        asked_s, first = time.perf_counter(), True
        async for count in target.generate(prompt, num_tokens, 600.0):
            if first:
                first_s.append(time.perf_counter() - asked_s)
            first, num_seen = False, num_seen + count

    await asyncio.gather(*(one(prompt) for prompt in prompts))
    assert num_seen == num_tokens * len(prompts), f"{num_seen} tokens came"
    return median(first_s), num_seen / (time.perf_counter() - begun_s)


async def measure(
    args: argparse.Namespace, running: Running, url: str, bare: str
) -> dict[str, dict[str, dict[str, float]]]:
    engine, paths = (f"ipc://{next(running.folder.rglob(name))}" for name in ("engine", "paths"))
    service = connect_service([engine], paths, args.model, args.model.name)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    async with AsyncExitStack() as stack:
        door = await stack.enter_async_context(opened(running.target, "grpc", "", None, None))
        http = await stack.enter_async_context(opened(url, "openai", "", None, None))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(bare))
        targets: dict[str, Target] = {SERVICE: ServiceTarget(service), "gRPC": door, "Serve HTTP": http}
        targets[BARE] = BareTarget(channel)
        vocab_size = int((await targets[SERVICE].info())["vocab_size"])
        await http.info()
        rng, names = np.random.default_rng(0), list(targets)
        for number in range(-1, args.rounds):  # the first warms up
            for num_requests in args.requests:
                for name in names:
                    # New prompts each time: none has a beginning that is known already.
                    prompts = rng.integers(3, vocab_size, size=(num_requests, args.prompt_tokens)).tolist()
                    figures = await burst(targets[name], prompts, args.tokens)
                    if number >= 0:
                        found.setdefault(str(num_requests), {}).setdefault(name, []).append(figures)
            names = names[1:] + names[:1]
    await service.close()
    return {
        num_requests: {
            name: {
                "first_token_ms": median(first for first, _ in runs) * 1000,
                "tokens_per_s": median(rate for _, rate in runs),
            }
            for name, runs in of_names.items()
        }
        for num_requests, of_names in found.items()
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        "| requests | through | first token, ms | more | tokens/s | share |",
        "| --: | --- | --: | --: | --: | --: |",
    ]
    for num_requests, of_names in results["found"].items():
        base = of_names[SERVICE]
        for name, figures in of_names.items():
            if name == BARE:
                lines.append(
                    f"| {num_requests} | {name} | {figures['first_token_ms']:.1f} | | {figures['tokens_per_s']:.0f} | |"
                )
                continue
            more = figures["first_token_ms"] - base["first_token_ms"]
            share = figures["tokens_per_s"] / base["tokens_per_s"]
            lines.append(
                f"| {num_requests} | {name} | {figures['first_token_ms']:.1f} | {more:+.1f} |"
                f" {figures['tokens_per_s']:.0f} | {share:.3f} |"
            )
    return "\n".join(lines)


def haproxy(folder: Path) -> dict[str, str]:
    """What tells Serve to have HAProxy before its replicas, with its files in this folder."""
    files = {
        "SOCKET_PATH": "admin.sock", "CONFIG_FILE_LOC": "haproxy.cfg", "SERVER_STATE_BASE": "",
        "SERVER_STATE_FILE": "state",
    }  # fmt: skip
    return {"RAY_SERVE_ENABLE_HA_PROXY": "1"} | {f"RAY_SERVE_HAPROXY_{k}": str(folder / v) for k, v in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--engine-threads", type=int, default=1)
    parser.add_argument("--haproxy", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results as PATH.json and PATH.md")
    args = parser.parse_args()
    args.model = args.model.resolve()
    if args.haproxy:
        os.environ |= haproxy(Path(tempfile.mkdtemp(prefix="haproxy-")))
    around = surroundings("doors", ("grpcio", "ray", "fastapi"))
    with (
        serving("--model", args.model, "--engine-threads", args.engine_threads) as running,
        http_app(running, {"model": str(args.model), "engine_threads": args.engine_threads}) as url,
        bare_server() as bare,
    ):
        found = asyncio.run(measure(args, running, url, bare))
    results = {"around": around, "model": args.model.name, "rounds": args.rounds, "found": found}
    args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    what = (
        f"{args.model.name}, experts in the engine's process, prompts of {args.prompt_tokens} ids, {args.tokens} tokens"
    )
    proxy = "HAProxy" if args.haproxy else "Serve's own proxy"
    how = f"each, medians of {args.rounds} rounds in turn, {proxy} before Serve's replica. {sentence(around)}."
    text = f"# What the doors add\n\n{what} {how}\n\n{table(results)}\n"
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
