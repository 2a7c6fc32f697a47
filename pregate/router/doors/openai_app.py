"""The HTTP front door: OpenAI-style `/v1/completions` and `/v1/models`, and `/health`, over a DoorService."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pregate.base import log
from pregate.base.completion import Chunk, Completion, TokenLogprob
from pregate.base.errors import PregateError, UserError
from pregate.router.doors.access import TokenFile, cache_salt
from pregate.router.doors.service import DoorService
from pregate.router.link.messages import SamplingParams

logger = log.get_logger(__name__)
_HTTP_STATUS: Mapping[str, int] = MappingProxyType(
    {
        "INVALID_ARGUMENT": 400,
        "UNAUTHENTICATED": 401,
        "NOT_FOUND": 404,
        "RESOURCE_EXHAUSTED": 429,
        "INTERNAL": 500,
        "UNAVAILABLE": 503,
        "DEADLINE_EXCEEDED": 504,
    }
)
_RETRY_AFTER_S = 1
#: What a door takes that does not know its engine yet.
_MAX_BODY_BYTES = 64 << 20
_BUG = "internal error; the server's log has it"
_Stream: TypeAlias = AsyncGenerator[Chunk | Completion, None]
_Word: TypeAlias = Callable[[int], str]
_T = TypeVar("_T")


class _UnauthenticatedError(PregateError):
    code = "UNAUTHENTICATED"


class StreamOptions(BaseModel):
    """`include_usage`: a last event carries the counts."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class CompletionRequest(BaseModel):
    """OpenAI's body with OpenAI's defaults, and vLLM's names beside them; what pregate cannot do is refused unless it
    is at its neutral value."""

    model_config = ConfigDict(extra="forbid", strict=True)  # true is no 1, nor is "1"
    model: str = ""
    prompt: str | list[int] | list[str]
    max_tokens: int | None = 16
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    seed: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    user: str | None = None
    n: int | None = 1
    logprobs: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    top_k: int | None = 0
    min_p: float | None = 0.0
    repetition_penalty: float | None = None
    min_tokens: int | None = 0
    prompt_logprobs: int | None = None
    priority: int = 0
    best_of: int | None = 1
    echo: bool | None = False
    suffix: str | None = None

    def sampling(self) -> SamplingParams:
        """Return the sampling part. Raises UserError for a field that is set and not supported."""
        for name, neutral in _NEUTRAL.items():
            if getattr(self, name) not in neutral:
                raise UserError.of(name, json.dumps(getattr(self, name)), "is not supported; leave it out")
        stop = [self.stop] if isinstance(self.stop, str) and self.stop else self.stop or ()
        return SamplingParams(
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            top_k=0 if self.top_k == -1 else self.top_k or 0,  # vLLM's -1 is every token
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_bias(self.logit_bias or {}),
            min_tokens=self.min_tokens or 0,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            stop=tuple(stop),
            n=1 if self.n is None else self.n,
        )

    def single_prompt(self) -> str | list[int]:
        """Return the prompt as text or ids. Raises UserError for a list of several texts."""
        if isinstance(self.prompt, str):
            return self.prompt
        ids = [item for item in self.prompt if isinstance(item, int)]
        if len(ids) == len(self.prompt):
            return ids
        if len(self.prompt) != 1:
            raise UserError.of("prompt", f"of {len(self.prompt)} texts", "must be one text or one list of token ids")
        return str(self.prompt[0])


_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "best_of": (None, 1),
        "echo": (None, False),
        "suffix": (None, ""),
    }
)


def build_app(service: DoorService, *, tokens: TokenFile | None = None, timeout_s: float = 600.0) -> FastAPI:
    """Return the application. With `tokens`, all but `/health` ask for one; `timeout_s` is each request's deadline."""
    app = FastAPI(title="pregate", docs_url=None, redoc_url=None)
    app.add_exception_handler(PregateError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(_BoundedBody, service=service)

    async def authorize(request: Request) -> None:
        if tokens is not None and not tokens.accepts(request.headers.get("authorization")):
            raise _UnauthenticatedError("send the header `Authorization: Bearer TOKEN` with a token this server knows")

    @app.get("/health")
    async def health() -> JSONResponse:
        service.open()
        reason = service.unavailable
        return JSONResponse({"status": reason or "ok"}, 503 if reason else 200)

    @app.get("/v1/models", dependencies=[Depends(authorize)])
    async def models() -> dict[str, Any]:
        info = await service.model_info()
        card = {"id": info["model"], "object": "model", "owned_by": "pregate", "max_model_len": info["max_context"]}
        return {"object": "list", "data": [card]}

    @app.post("/v1/completions", dependencies=[Depends(authorize)])
    async def completions(body: CompletionRequest, request: Request) -> Response:
        prompt, sampling = body.single_prompt(), body.sampling()
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        head["model"] = service.model_name
        asked = {"deadline_s": timeout_s, "model": body.model, "priority": body.priority}
        asked["salt"] = cache_salt(request.headers.get("authorization"))
        word = service.word if body.logprobs is not None or body.prompt_logprobs is not None else None
        if not body.stream:
            completions = await _unless_disconnected(service.complete_all(prompt, sampling, **asked), request)
            if completions is None:
                return Response(status_code=499)  # nginx's number for a client that is gone; nobody reads it
            choices = [_choice(c, word) for c in completions]
            return JSONResponse({**head, "choices": choices, "usage": _usage(completions)})
        stream = service.generate(prompt, sampling, **asked)
        first = await anext(stream)  # what fails before the first item still gets a status of its own
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(_events(first, stream, head, word, usage=usage), media_type="text/event-stream")

    return app


class _BoundedBody:
    """Refuses a body that is larger than any prompt that fits the context, without reading it to its end."""

    def __init__(self, app: ASGIApp, service: DoorService) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        most = self._service.max_message_bytes or _MAX_BODY_BYTES
        num_bytes = 0

        async def bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > most:
                raise HTTPException(413, f"body of {num_bytes} bytes or more: allowed: {most}")
            return message

        stated = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if stated.isdecimal() and int(stated) > most:
            refusal = _error_response("INVALID_ARGUMENT", f"body of {stated} bytes: allowed: {most}", 413)
            await refusal(scope, receive, send)
        else:
            await self._app(scope, bounded, send)


async def _unless_disconnected(work: Coroutine[Any, Any, _T], request: Request) -> _T | None:
    """Return what `work` gives, or None when the client went away first; the request is cancelled then."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    first: Chunk | Completion, stream: _Stream, head: dict[str, Any], word: _Word | None, *, usage: bool
) -> AsyncGenerator[str, None]:
    completions: list[Completion] = []
    async with aclosing(stream):
        item: Chunk | Completion | None = first
        try:
            while item is not None:
                yield _event({**head, "choices": [_choice(item, word, streamed=True)]})
                completions += [item] if isinstance(item, Completion) else []
                item = await anext(stream, None)
            if usage:
                yield _event({**head, "choices": [], "usage": _usage(completions)})
        except PregateError as error:
            yield _event(_error_body(error.code, str(error)))
        except Exception:
            logger.exception("a stream failed by a bug")
            yield _event(_error_body("INTERNAL", _BUG))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _choice(item: Chunk | Completion, word: _Word | None, *, streamed: bool = False) -> dict[str, Any]:
    """Return one choice; the last one of a stream repeats neither text nor ids."""
    ended = isinstance(item, Completion)
    repeat = ended and streamed
    choice = {
        "index": item.index,
        "text": "" if repeat else item.text,
        "token_ids": [] if repeat else list(item.token_ids),
        "logprobs": _logprobs(item.logprobs, word) if word and item.logprobs and not repeat else None,
        "finish_reason": item.finish_reason if ended else None,
    }
    if word and item.prompt_logprobs and not repeat:
        choice["prompt_logprobs"] = _logprobs(item.prompt_logprobs, word)
    return choice


def _logprobs(tokens: Sequence[TokenLogprob], word: _Word) -> dict[str, Any]:
    """OpenAI's lists; tokens are named by their text, which is not theirs alone, and by their ids."""
    return {
        "tokens": [word(t.token_id) for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [{word(i): value for i, value in reversed(t.top)} for t in tokens],
        "token_ids": [t.token_id for t in tokens],
        "top_token_ids": [[i for i, _ in t.top] for t in tokens],
    }


def _bias(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    wrong = next((name for name in given if not name.isdecimal()), None)
    if wrong is not None:
        raise UserError.of("logit_bias", json.dumps(wrong), "must be a token id")
    return tuple(sorted((int(name), value) for name, value in given.items()))


def _usage(completions: Sequence[Completion]) -> dict[str, int]:
    prompt, new = completions[0].prompt_tokens, sum(c.completion_tokens for c in completions)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _error_body(code: str, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if _HTTP_STATUS[code] < 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code.lower()}}


def _error_response(code: str, message: str, status: int | None = None) -> JSONResponse:
    headers = {"Retry-After": str(_RETRY_AFTER_S)} if code == "RESOURCE_EXHAUSTED" else None
    return JSONResponse(_error_body(code, message), status or _HTTP_STATUS[code], headers)


async def _on_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, PregateError)
    return _error_response(error.code, str(error))


async def _on_http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = "NOT_FOUND" if error.status_code == 404 else "INVALID_ARGUMENT"
    return _error_response(code, str(error.detail), error.status_code)


async def _on_invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body")
    return _error_response("INVALID_ARGUMENT", f"{field or 'body'}: {first['msg']}")


async def _on_bug(_: Request, error: Exception) -> JSONResponse:
    logger.error("a request failed by a bug", exc_info=error)
    return _error_response("INTERNAL", _BUG)
