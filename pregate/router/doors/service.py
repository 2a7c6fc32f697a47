"""The one async API behind every front door: validate, tokenise, admit, stream text, route."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pregate.base import log
from pregate.base.completion import Chunk, Completion
from pregate.base.errors import DeadlineError, NotFoundError, PregateError, UnavailableError, UserError
from pregate.base.sampling import check_ids, check_priority, most_tokens
from pregate.base.telemetry import given
from pregate.model.tokenizer import read_tokenizer
from pregate.router.doors.chat import ChatTemplate
from pregate.router.doors.completion_stream import completion_stream, copies_of
from pregate.router.doors.completion_text import CompletionText
from pregate.router.doors.in_flight import InFlight, Taken
from pregate.router.doors.packed_route import PackedRoute
from pregate.router.doors.prompt_reader import Prompt, PromptReader
from pregate.router.doors.request_watch import RequestMetrics
from pregate.router.doors.together import together
from pregate.router.doors.token_texts import TokenTexts
from pregate.router.link.client import EngineClient
from pregate.router.link.engines import Engine
from pregate.router.link.messages import SamplingParams, SubmitRequest, check_prompt
from pregate.router.link.path_client import PathClient

#: How long the first token may take before a door is called ready.
_PROOF_S = 10.0
#: How long a status waits for what the path service says: one that stands still holds up nothing else.
_PATHS_SAY_S = 1.0
#: What a message holds beside its prompt.
_OTHER_FIELDS_BYTES = 64 << 10


@dataclass(frozen=True)
class ServiceOptions:
    """`max_requests` bounds what one front door has in flight; the engine bounds its own queue besides."""

    max_requests: int = 1024


class DoorService:
    """Speaks token ids to the engine and text to the doors. Raises CheckpointError without a readable tokenizer.

    `path_client` leads to the path service, where there is one: a prompt goes there first, and to the engine with its
    paths.
    """

    def __init__(
        self,
        engine_client: Engine,
        tokenizer_dir: str | Path,
        model_name: str,
        *,
        options: ServiceOptions | None = None,
        path_client: PathClient | None = None,
    ) -> None:
        self.model_name, self.metrics = model_name, RequestMetrics()
        self._engine, self._paths = engine_client, path_client
        self._tokenizer = read_tokenizer(Path(tokenizer_dir))
        self._texts = TokenTexts(self._tokenizer)
        self._prompts = PromptReader(self._tokenizer, ChatTemplate(Path(tokenizer_dir)))
        most, at_door = (options or ServiceOptions()).max_requests, "num_requests_at_door"
        self._in_flight = InFlight(most, lambda num: self.metrics.record(at_door, num))
        self._draining, self._proven = False, False
        self._limits: tuple[int, int] | None = None  # vocab_size, max_context
        self._stop_strings: tuple[str, ...] = ()  # the model's own

    @property
    def unavailable(self) -> str | None:
        """Why requests are refused now, or None."""
        if self._draining:
            return "the server is draining"
        return self._engine.unavailable or (self._paths.unavailable if self._paths is not None else None)

    @property
    def lost(self) -> str | None:
        """Why this door is of no use any more, or None: an engine, or path service, that cannot be reached."""
        return self._engine.lost or (self._paths.lost if self._paths is not None else None)

    async def unready(self) -> str | None:
        """Why requests should go elsewhere now, or None: not before a token was generated here for the first time,
        and for the first time after the engine was away."""
        self.open()
        if self.unavailable is None and not self._proven:
            try:
                await self.complete((0,), SamplingParams(max_tokens=1), deadline_s=_PROOF_S)
            except PregateError as error:
                return self.unavailable or f"no token could be generated: {error}"
        self._proven = self.unavailable is None
        return self.unavailable

    @property
    def max_message_bytes(self) -> int | None:
        """The largest message a prompt that fits the context can need, as text or ids; None until the engine answered.

        JSON may write a character of n bytes in 3 n bytes, and an id in 10.
        """
        if self._limits is None:
            return None
        return self._limits[1] * max(3 * self._prompts.token_bytes, 10) + _OTHER_FIELDS_BYTES

    def open(self) -> None:
        """Connect to the engine. Must be called inside a running event loop; `generate` and others do it too."""
        self._engine.open()
        if self._paths is not None:
            self._paths.open()

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        deadline_s: float | None = None,
        model: str = "",
        request_id: str = "",
        salt: str = "",
        priority: int = 0,
        generated_ids: Sequence[int] = (),
        resumes: bool = False,
        cut: bool = False,
    ) -> AsyncGenerator[Chunk | Completion, None]:
        """Yield chunks as they are made, then one Completion; of `n` completions, each with its index, as they come.

        A `max_tokens` above what the context leaves is refused, or `cut`, for who named none. `salt` names who asks:
        equal prompts of theirs share work, and a `request_id` of theirs that runs is refused, unless this one `resumes`
        it: then the other is aborted. After `generated_ids`, which it generated before, it goes on as if unbroken; the
        first chunk repeats them with their text. Leaving early (use `contextlib.aclosing`) cancels.
        Raises UserError, NotFoundError, QueueFullError, UnavailableError, DeadlineError.
        """
        request_id = request_id or uuid.uuid4().hex
        if resumes:
            await self.abort([request_id], salt)
        with self.metrics.watch(sampling.n) as watch, self._admitted(salt, request_id, sampling.n) as taken:
            self._check_model(model)
            check_priority(priority)
            vocab_size, max_context = await self._get_limits()
            sampling.validate(vocab_size)
            prompt_ids = await self._prompts.encode(prompt, max_context - 1)
            check_prompt(prompt_ids, vocab_size=vocab_size, max_context=max_context)
            watch.taken(len(prompt_ids))
            max_tokens = most_tokens(sampling.max_tokens, len(prompt_ids), max_context, cut=cut)
            known_ids = self._known_ids(generated_ids, sampling.n, max_tokens)
            stops = sampling.stop if sampling.ignore_eos else (*sampling.stop, *self._stop_strings)
            alone = replace(sampling, max_tokens=max_tokens, stop=(), n=1)
            if known_ids:  # they came after the prompt's
                alone = replace(alone, prompt_logprobs=None)
            # Its own id: two callers may have chosen the same.
            request = SubmitRequest(
                uuid.uuid4().hex,
                prompt_ids + known_ids,
                alone,
                deadline_s,
                salt,
                priority=priority,
                num_generated=len(known_ids),
                called=log.request_id.get() or request_id,
                traceparent=watch.traceparent,
            )
            copies = copies_of(await self._with_paths(request), sampling.n)
            taken.engine_ids = [copy.request_id for copy in copies]
            texts = [CompletionText(self._texts, copy, stops, index) for index, copy in enumerate(copies)]
            streams = [
                completion_stream(self._engine, copy, text, request_id, taken, watch.text())
                for copy, text in zip(copies, texts, strict=True)
            ]
            async with aclosing(streams[0] if len(streams) == 1 else together(streams)) as stream:
                async for item in stream:
                    yield item

    @property
    def num_requests(self) -> int:
        """Completions that were asked for here and have not ended."""
        return self._in_flight.num_requests

    async def abort(self, request_ids: Iterable[str], salt: str) -> list[str]:
        """End requests of who has this `salt`: they give one Completion more, of finish_reason abort. Returns the ids
        that ran."""
        found = []
        for request_id in request_ids:
            taken = self._in_flight.find(salt, request_id)
            if taken is not None and not taken.aborted:
                taken.aborted = True
                found.append(request_id)
                for engine_id in taken.engine_ids:
                    await self._engine.abort(engine_id)
        return found

    async def complete(self, prompt: Prompt, sampling: SamplingParams, **options: Any) -> Completion:
        """Return the end of `generate`, when only that is wanted; `options` are those of `generate`."""
        return (await self.complete_all(prompt, sampling, **options))[0]

    async def complete_all(self, prompt: Prompt, sampling: SamplingParams, **options: Any) -> list[Completion]:
        """Return all `n` completions, in order."""
        async with aclosing(self.generate(prompt, sampling, **options)) as stream:
            found = [item async for item in stream if isinstance(item, Completion)]
        if len(found) != sampling.n:
            raise UnavailableError("the engine ended the stream early")
        return sorted(found, key=lambda completion: completion.index)

    async def route(self, prompt: Prompt, *, deadline_s: float | None = None, model: str = "") -> PackedRoute:
        """Return the expert path of every prompt token. Raises UserError when the checkpoint has no path router."""
        self._check_model(model)
        self._check_draining()
        vocab_size, max_context = await self._get_limits()
        token_ids = await self._prompts.encode(prompt, max_context)
        check_prompt(token_ids, vocab_size=vocab_size, max_context=max_context + 1)
        start_s = time.monotonic()
        reply = await (self._paths or self._engine).route(token_ids, deadline_s, traceparent=given.get())
        self.metrics.record("route_seconds", time.monotonic() - start_s)
        return PackedRoute.of(token_ids, tuple(map(self.token, token_ids)), reply)

    async def model_info(self, *, model: str = "") -> dict[str, Any]:
        """Return the engine's info (see EngineClient.info) under the name this service serves it by."""
        self._check_model(model)
        info = await self._engine.info()
        if self._paths is not None:
            info["path_service"] = said = await self._said_by(self._paths)
            info["num_waiting_for_paths"] = said.get("num_queued", 0)
        self._limits = int(info["vocab_size"]), int(info["max_context"])
        self._stop_strings = tuple(info["stop_strings"])
        return {**info, "model": self.model_name}

    async def _said_by(self, paths: EngineClient) -> dict[str, Any]:
        """What the path service says of itself, or why it says nothing, which keeps nobody from the engine's."""
        try:
            said = await paths.info(_PATHS_SAY_S)
        except UnavailableError as error:
            return {"unavailable": str(error)}
        return said | {"num_turns": said["progress"]}

    async def tokenize(self, prompt: Prompt, *, special: bool | None = None, model: str = "") -> tuple[int, ...]:
        """Return the ids that `prompt` is sent as, more than the context holds too. `special` False keeps the tokenizer
        from adding what it adds to a text, True makes it add that to a chat."""
        self._check_model(model)
        return await self._prompts.encode(prompt, sys.maxsize, special)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """Return the text of these ids, special tokens included. UserError for ids that are none."""
        self._check_model(model)
        vocab_size, _ = await self._get_limits()
        check_ids("tokens", token_ids, vocab_size)
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """A token as the vocabulary spells it."""
        return self._tokenizer.id_to_token(token_id) or ""

    def word(self, token_id: int) -> str:
        """The text of one token by itself."""
        return self._texts.word(token_id)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests; wait for the running ones. Returns whether all ended in time."""
        self._draining = True
        try:
            await asyncio.wait_for(self._in_flight.idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Disconnect from the engine; what still runs fails with UnavailableError."""
        self._draining = True
        await self._engine.close()
        if self._paths is not None:
            await self._paths.close()

    async def _with_paths(self, request: SubmitRequest) -> SubmitRequest:
        """The request with its prompt's paths, and the rest of its time. Raises DeadlineError where none is left."""
        if self._paths is None:
            return request
        start_s = time.monotonic()
        asked = request.token_ids, request.deadline_s
        reply = await self._paths.route(*asked, with_state=True, traceparent=request.traceparent)
        took_s = time.monotonic() - start_s
        self.metrics.record("route_seconds", took_s)
        left_s = None if request.deadline_s is None else request.deadline_s - took_s
        if left_s is not None and left_s <= 0:
            raise DeadlineError("the deadline passed before the paths were there")
        return replace(request, deadline_s=left_s, paths=reply.paths, path_state=reply.state)

    async def _get_limits(self) -> tuple[int, int]:
        if self._limits is None:
            await self.model_info()
        assert self._limits is not None
        return self._limits

    def _known_ids(self, generated_ids: Sequence[int], n: int, max_tokens: int) -> tuple[int, ...]:
        """What to go on after: all that was generated, or all but the last of `max_tokens`, which says that it ends."""
        assert self._limits is not None
        if generated_ids and n > 1:
            raise UserError.of("n", n, "allowed beside generated_ids: 1")
        check_ids("generated token id", generated_ids, self._limits[0])
        return tuple(generated_ids[: max_tokens - 1])

    def _check_model(self, model: str) -> None:
        if model and model != self.model_name:
            raise NotFoundError.of("model", model, f"is not served here; allowed: {self.model_name}")

    def _check_draining(self) -> None:
        if self._draining:
            raise UnavailableError("the server is draining")

    def _admitted(self, salt: str, request_id: str, num: int) -> AbstractContextManager[Taken]:
        self._check_draining()
        return self._in_flight.take(salt, request_id, num)
