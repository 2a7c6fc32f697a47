"""Where a load goes: a gRPC server of ours, or any server of OpenAI's completions. Ids out, times of tokens back."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from pregate.base.errors import BY_CODE, PregateError, UnavailableError, UserError
from pregate.base.pem import read_pem

#: What a status of HTTP is called over gRPC.
_CODES = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 404: "NOT_FOUND", 413: "INVALID_ARGUMENT"}
_CODES |= {429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED"}
_WAIT_S = 30.0


class RequestError(PregateError):
    """A request that a target refused or failed; `status` is gRPC's name for why."""

    def __init__(self, status: str, details: str) -> None:
        super().__init__(f"{status}: {details}")
        self.status = status


class Target(Protocol):
    """A server under load."""

    async def info(self) -> dict[str, Any]:
        """What it says of itself, as far as it does: max_context_length, vocab_size, num_steps, ..."""
        ...

    def generate(self, prompt_ids: Sequence[int], num_tokens: int, timeout_s: float) -> AsyncGenerator[int, None]:
        """Yield how many new tokens have come, each time some do, to the end. Raises RequestError."""
        ...


class GrpcTarget:
    """A pregate server."""

    def __init__(self, channel: Any, model: str, token: str | None) -> None:
        from pregate.client.proto import pregate_pb2_grpc as pb_grpc

        self._stub: Any = pb_grpc.PregateStub(channel)
        self._model = model
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)

    async def info(self) -> dict[str, Any]:
        import grpc

        from pregate.client.proto import pregate_pb2 as pb

        request = pb.GetModelInfoRequest(model=self._model)
        try:
            reply = await self._stub.GetModelInfo(request, timeout=_WAIT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            code = error.code().name  # pyright: ignore[reportAttributeAccessIssue]
            raise BY_CODE.get(code, PregateError)(f"{code}: {error.details()}") from None  # pyright: ignore[reportAttributeAccessIssue]
        return {field.name: getattr(reply, field.name) for field in reply.DESCRIPTOR.fields}

    async def generate(self, prompt_ids: Sequence[int], num_tokens: int, timeout_s: float) -> AsyncGenerator[int, None]:
        import grpc

        from pregate.client.proto import pregate_pb2 as pb

        request = pb.GenerateRequest(
            tokenized=pb.TokenizedInput(input_ids=prompt_ids),
            sampling_params=pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True),
            stream=True,
            model=self._model,
        )
        try:
            async for reply in self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata):
                if reply.WhichOneof("response") == "chunk" and reply.chunk.token_ids:
                    yield len(reply.chunk.token_ids)
        except grpc.RpcError as error:
            raise RequestError(error.code().name, error.details() or "") from None  # pyright: ignore[reportAttributeAccessIssue]


class OpenAITarget:
    """A server of `/v1/completions`: pregate's Serve application, vLLM, llama.cpp. A chunk without `token_ids` counts
    as one token; the counts of `usage` at the end correct that."""

    def __init__(self, session: Any, url: str, model: str) -> None:
        self._session, self._url, self._model = session, url.rstrip("/").removesuffix("/v1"), model

    async def info(self) -> dict[str, Any]:
        import aiohttp

        try:
            async with self._session.get(f"{self._url}/v1/models") as response:
                card = (await response.json())["data"][0]
        except (aiohttp.ClientError, KeyError, IndexError, ValueError, OSError) as error:
            raise UnavailableError(f"{self._url}/v1/models: no list of models ({error})") from None
        self._model = self._model or card["id"]
        return {"model": card["id"], "max_context_length": card.get("max_model_len")}

    async def generate(self, prompt_ids: Sequence[int], num_tokens: int, timeout_s: float) -> AsyncGenerator[int, None]:
        import aiohttp

        body = {
            "model": self._model, "prompt": list(prompt_ids), "max_tokens": num_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        num_seen = 0
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            async with self._session.post(f"{self._url}/v1/completions", json=body, timeout=timeout) as response:
                if response.status != 200:
                    raise RequestError(_CODES.get(response.status, "INTERNAL"), (await response.text())[:200])
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        new = _num_new(json.loads(line[6:]), num_seen)
                        num_seen += new
                        if new:
                            yield new
        except TimeoutError:
            raise RequestError("DEADLINE_EXCEEDED", f"no end within {timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise RequestError("UNAVAILABLE", str(error)) from None


def _num_new(event: dict[str, Any], num_seen: int) -> int:
    """How many tokens an event of a stream brings that were not counted yet."""
    if "error" in event:
        raise RequestError(str(event["error"].get("code") or "internal").upper(), str(event["error"].get("message")))
    usage = event.get("usage")
    if usage:
        return max(0, int(usage["completion_tokens"]) - num_seen)
    choices = event.get("choices") or []
    return sum(len(c["token_ids"]) if c.get("token_ids") is not None else bool(c.get("text")) for c in choices)


@asynccontextmanager
async def opened(
    target: str, kind: str, model: str, token: str | None, ca: Path | None
) -> AsyncGenerator[GrpcTarget | OpenAITarget, None]:
    """The target, connected; UserError where a token would travel in clear text."""
    from pregate.client.connection import stays_here

    host = target.partition("://")[2] or target
    clear = ca is None and not target.startswith("https://")
    if token is not None and clear and not stays_here(host.partition("/")[0]):
        raise UserError.of("--token-file", f"for {target}", "would travel in clear text; give --ca too")
    if kind == "openai":
        import ssl

        import aiohttp

        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        context = ssl.create_default_context(cadata=None if ca is None else read_pem("--ca", ca).decode())
        connector = aiohttp.TCPConnector(limit=0, ssl=context)
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            yield OpenAITarget(session, target, model)
        return
    import grpc.aio

    options = (("grpc.enable_http_proxy", 0),) if stays_here(target) else ()
    if ca is None:
        channel = grpc.aio.insecure_channel(target, options=options)
    else:
        channel = grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(read_pem("--ca", ca)), options=options)
    async with channel:
        yield GrpcTarget(channel, model, token)
