"""The HTTP front door: OpenAI's routes, and beside them health, tokens, paths and experts, over a DoorService."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from pregate import __version__
from pregate.base import log
from pregate.router.doors.access import TokenFile, cache_salt
from pregate.router.doors.http import tools
from pregate.router.doors.http.answering import answer, answer_streamed, new_head, numbered
from pregate.router.doors.http.bodies import ChatBody, CompletionBody, SamplingBody
from pregate.router.doors.http.chat_completions import ChatShape
from pregate.router.doors.http.completions import CompletionShape
from pregate.router.doors.http.errors import JsonResponse, add_handlers
from pregate.router.doors.http.guards import Authorized, BoundedBody, Named
from pregate.router.doors.http.live_page import add_page
from pregate.router.doors.metrics_app import metrics_route
from pregate.router.doors.service import DoorService

#: What is told to anybody.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})


def build_app(service: DoorService, *, tokens: TokenFile | None = None, timeout_s: float = 600.0) -> FastAPI:
    """Return the application. With `tokens` all but `OPEN_PATHS` ask for one; `timeout_s`: a request's deadline."""
    app = FastAPI(title="pregate", version=__version__, docs_url=None, redoc_url=None)
    add_handlers(app)
    app.add_middleware(BoundedBody, most=lambda: service.max_message_bytes)
    if tokens is not None:
        app.add_middleware(Authorized, tokens=tokens, open_paths=OPEN_PATHS)
    app.add_middleware(Named)  # the last one added is the first to see a request
    _add_health(app, service)
    tools.add_routes(app, service, timeout_s, private=tokens is not None)
    app.router.routes.append(metrics_route(service))
    add_page(app)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        prompts, sampling = body.prompts(), body.sampling()
        echoed = []
        if body.echo:
            ids = [await service.tokenize(prompt, model=body.model) for prompt in prompts]
            texts = [p if isinstance(p, str) else await service.detokenize(p) for p in prompts]
            echoed, prompts = [(text, i[0] if i else 0) for text, i in zip(texts, ids, strict=True)], ids
        head = new_head(f"cmpl-{log.request_id.get()}", service.model_name)
        asked = _asked(body, request, timeout_s)
        stream = numbered([service.generate(prompt, sampling, **asked) for prompt in prompts], sampling.n)
        word = service.word if body.logprobs is not None or body.prompt_logprobs is not None else None
        shape = CompletionShape(word, echoed, n=sampling.n, only_echo=body.only_echo)
        if body.stream:
            return await answer_streamed(request, stream, shape, head, sampling.n, usage=body.wants_usage)
        return await answer(request, stream, shape, head, len(prompts) * sampling.n, sampling.n)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        chat, sampling = body.chat(), body.sampling()
        head = new_head(f"chatcmpl-{log.request_id.get()}", service.model_name)
        stream = service.generate(chat, sampling, **_asked(body, request, timeout_s))
        shape = ChatShape(service.word if body.logprobs else None)
        if body.stream:
            return await answer_streamed(request, stream, shape, head, sampling.n, usage=body.wants_usage)
        return await answer(request, stream, shape, head, sampling.n, sampling.n)

    return app


def _asked(body: SamplingBody, request: Request, timeout_s: float) -> dict[str, Any]:
    salt = cache_salt(request.headers.get("authorization"))
    known = {"deadline_s": timeout_s, "model": body.model, "priority": body.priority, "salt": salt}
    return {**known, "cut": not body.names_max_tokens}


def _add_health(app: FastAPI, service: DoorService) -> None:
    @app.get("/health")
    async def health() -> JsonResponse:
        """Whether this server is of any use: 503 when it has lost its engine, and should be started anew."""
        service.open()
        reason = service.lost
        return JsonResponse({"status": reason or "ok"}, 503 if reason else 200)

    @app.get("/ready")
    async def ready() -> JsonResponse:
        """Whether to send requests here: 503 before the first token, while draining, without an engine or a host."""
        reason = await service.unready()
        return JsonResponse({"status": reason or "ok"}, 503 if reason else 200)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}
