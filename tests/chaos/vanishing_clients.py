"""Clients that stream, in a process that is to be killed.

    python tests/chaos/vanishing_clients.py GRPC_PORT HTTP_PORT NUM

Half over gRPC and half over HTTP, each with a connection of its own; prints a line for each that streams.
"""

import asyncio
import json
import sys

import grpc

from pregate.client.proto import pregate_pb2 as pb
from pregate.client.proto import pregate_pb2_grpc as pb_grpc

TEXT, TOKENS = "O wind that walks", 200


async def over_grpc(port: str, number: int) -> None:
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        sampling = pb.SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=1.0, seed=number)
        request = pb.GenerateRequest(text=TEXT, sampling_params=sampling, stream=True)
        async for _ in pb_grpc.PregateStub(channel).Generate(request):
            print(number, flush=True)
            await asyncio.sleep(600)


async def over_http(port: str, number: int) -> None:
    body = json.dumps({"prompt": TEXT, "max_tokens": TOKENS, "ignore_eos": True, "stream": True, "seed": number})
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(f"{head}\r\n\r\n{body}".encode())
    await reader.readuntil(b"data: ")
    print(number, flush=True)
    await asyncio.sleep(600)


async def main(grpc_port: str, http_port: str, num: str) -> None:
    clients = [over_grpc(grpc_port, n) if n % 2 else over_http(http_port, n) for n in range(int(num))]
    await asyncio.gather(*clients)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
