"""`Engines`: several engines on one pool of hosts, to a front door as one. A stream that breaks goes on at another.

Every request is one engine's. What it has brought stays at the door, so that another engine can go on from there: the
prompt and the tokens that came are sent as `SubmitRequest.num_generated` says. A text that is greedy or has a seed is
the same then.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import fields, replace
from typing import Any, Protocol

from pregate.base.errors import DeadlineError, UnavailableError
from pregate.base.log import get_logger
from pregate.router.link.client import EngineClient
from pregate.router.link.engine_health import EngineClientOptions
from pregate.router.link.messages import FinishedEvent, RouteReply, SubmitRequest, TokensEvent
from pregate.router.link.tally import Tally
from pregate.workers.client.channel_options import ChannelStats

logger = get_logger(__name__)
#: As for one engine, but one that is stopped is not waited for: others can go on with what it had.
OPTIONS = EngineClientOptions(frozen_s=4.0)
#: Of `EngineClient.info()`: what every engine has for itself. The rest is the same of all, or the first one's.
_ADDED = (
    "num_running", "num_queued", "queued_bytes", "kv_blocks_free", "kv_blocks_shared", "kv_blocks", "kv_bytes",
)  # fmt: skip
#: What it counts for itself, and only grows.
_GROWING = ("num_steps", "num_step_tokens", "num_step_units", "step_s", "num_preempted", "prefix_tokens")
#: How long one engine is waited for where several are asked (`ENGINE_PATIENCE_S` is for all of them).
_INFO_S = 1.5
#: The same of each host: what an engine sent there and waited for.
_GROWING_OF_HOSTS = ("rows", *(field.name for field in fields(ChannelStats)))


class Engine(Protocol):
    """What a front door needs of an engine, or of several; `EngineClient` says more."""

    @property
    def unavailable(self) -> str | None: ...
    @property
    def lost(self) -> str | None: ...
    def open(self) -> None: ...
    async def close(self) -> None: ...
    def generate(self, request: SubmitRequest) -> AsyncGenerator[TokensEvent | FinishedEvent, None]: ...
    async def abort(self, request_id: str) -> None: ...
    async def route(
        self, token_ids: Sequence[int], deadline_s: float | None = None, with_state: bool = False, traceparent: str = ""
    ) -> RouteReply: ...
    async def info(self, timeout_s: float | None = None) -> dict[str, Any]: ...


class Engines:
    """One `Engine` of several: each request goes to the one that has the fewest of this door's."""

    def __init__(self, clients: Sequence[EngineClient]) -> None:
        self._clients = clients
        self._tally = Tally()

    @property
    def unavailable(self) -> str | None:
        return self._why([client.unavailable for client in self._clients])

    @property
    def lost(self) -> str | None:
        return self._why([client.lost for client in self._clients])

    def _why(self, reasons: Sequence[str | None]) -> str | None:
        """None while it is of none or of some only."""
        found = [reason for reason in reasons if reason]
        return "; ".join(dict.fromkeys(found)) if len(found) == len(self._clients) else None

    def open(self) -> None:
        for client in self._clients:
            client.open()

    async def close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients))

    async def generate(self, request: SubmitRequest) -> AsyncGenerator[TokensEvent | FinishedEvent, None]:
        """As `EngineClient.generate`. UnavailableError when no engine goes on with it: as many attempts as there are
        engines, and one more, brought nothing."""
        began_s, num_failed, rest = time.monotonic(), 0, request
        tokens: list[int] = []
        client: EngineClient | None = None
        while True:
            client = self._choose(client if num_failed else None)
            again = len(tokens) - (rest.num_generated - request.num_generated)  # so many come once more
            try:
                async with aclosing(client.generate(rest)) as events:
                    async for event in events:
                        if isinstance(event, FinishedEvent):
                            yield event
                            return
                        new, again = _without(event, again)
                        tokens += new.token_ids
                        num_failed = 0
                        yield new
            except UnavailableError as error:
                num_failed += 1
                if num_failed > len(self._clients):
                    raise
                logger.warning("a request goes on at another engine: %s", error)
            rest = _rest(request, tokens, time.monotonic() - began_s)

    def _choose(self, failed: EngineClient | None) -> EngineClient:
        """Who has the least to do for this door; those that take nothing, and who has just failed a request, which
        may not have said so yet, only where no other is there."""
        self.open()
        some = [client for client in self._clients if not client.unavailable] or list(self._clients)
        others = [client for client in some if client is not failed] or some
        return min(others, key=lambda client: (client.num_running, random.random()))

    async def abort(self, request_id: str) -> None:
        for client in self._clients:
            await client.abort(request_id)

    async def route(
        self, token_ids: Sequence[int], deadline_s: float | None = None, with_state: bool = False, traceparent: str = ""
    ) -> RouteReply:
        """As `EngineClient.route`; UnavailableError when one attempt more than there are engines failed."""
        began_s, num_failed = time.monotonic(), 0
        client: EngineClient | None = None
        while True:
            left_s = _left_s(deadline_s, time.monotonic() - began_s)
            client = self._choose(client)
            try:
                return await client.route(token_ids, left_s, with_state, traceparent)
            except UnavailableError as error:
                num_failed += 1
                if num_failed > len(self._clients):
                    raise
                logger.warning("a route is asked of another engine: %s", error)

    async def info(self, timeout_s: float | None = None) -> dict[str, Any]:
        """What the engines say together: their counts added up, which never fall: of one that gives no answer in
        `_INFO_S`, or was started anew, what it had done when it last said so counts on. `engines` are of each.
        UnavailableError where none answers."""
        self.open()
        timeout_s = _INFO_S if timeout_s is None else timeout_s
        answers = await asyncio.gather(*(client.info(timeout_s) for client in self._clients), return_exceptions=True)
        found = {number: answer for number, answer in enumerate(answers) if isinstance(answer, dict)}
        if not found:
            raise next(answer for answer in answers if isinstance(answer, BaseException))
        for number, info in found.items():
            self._tally.take(number, _growing(info))
        engines = [_status(number, answer) for number, answer in enumerate(answers)]
        return _together(list(found.values()), self._tally) | {"engines": engines}


def _without(event: TokensEvent, num: int) -> tuple[TokensEvent, int]:
    """An event without its first `num` tokens, and how many are still to be passed over."""
    if not num:
        return event, 0
    left = max(0, num - len(event.token_ids))
    logprobs = event.logprobs[num:]
    return TokensEvent(event.request_id, event.token_ids[num:], logprobs, event.prompt_logprobs), left


def _rest(request: SubmitRequest, tokens: Sequence[int], after_s: float) -> SubmitRequest:
    """What is left to ask for when these tokens have come: all but the last of `max_tokens`, which says that it ends.
    DeadlineError where no time is left."""
    left_s = _left_s(request.deadline_s, after_s)
    if not tokens:
        return replace(request, deadline_s=left_s)
    known = tuple(tokens[: request.sampling.max_tokens - request.num_generated - 1])
    return replace(
        request,
        token_ids=request.token_ids + known,
        num_generated=request.num_generated + len(known),
        sampling=replace(request.sampling, prompt_logprobs=None),  # they have come
        deadline_s=left_s,
        paths=None,  # the engine has a path router of its own
        path_state=None,
    )


def _left_s(deadline_s: float | None, after_s: float) -> float | None:
    """What is left of a deadline; DeadlineError where nothing is."""
    left_s = None if deadline_s is None else deadline_s - after_s
    if left_s is not None and left_s <= 0:
        raise DeadlineError("the deadline passed before the answer was complete")
    return left_s


def _growing(info: Mapping[str, Any]) -> dict[Any, float]:
    """What an engine counted, of its hosts by their ids."""
    of_hosts = {(host["host_id"], name): host[name] for host in info["hosts"] for name in _GROWING_OF_HOSTS}
    return {name: info[name] for name in _GROWING} | of_hosts


def _status(number: int, answer: dict[str, Any] | BaseException) -> dict[str, Any]:
    """Of one engine: what it said, or why it said nothing."""
    if isinstance(answer, BaseException):
        return {"number": number, "unavailable": str(answer)}
    said = {name: answer[name] for name in ("num_running", "num_queued", "num_steps")}
    return {"number": number, "unavailable": answer["unavailable"] or "", **said}


def _together(infos: Sequence[Mapping[str, Any]], tally: Tally) -> dict[str, Any]:
    """Return the first one's facts with the numbers of all, and of `tally` those that grow. The engine that has been at
    something for longest says what they are busy with; a host is lost where none reaches it."""
    first = max(infos, key=lambda info: info["busy_s"] or 0.0)
    hosts = zip(*(info["hosts"] for info in infos), strict=False)
    unavailable = [info["unavailable"] for info in infos]
    return {
        **first,
        **{name: sum(info[name] for info in infos) for name in _ADDED},
        **{name: tally[name] for name in _GROWING},
        "unavailable": unavailable[0] if all(unavailable) else None,
        "last_paths": sorted((told for info in infos for told in info["last_paths"]), key=lambda told: told["ended_s"]),
        "hosts": [
            min(of_all, key=lambda host: host["lost_s"])
            | {name: tally[of_all[0]["host_id"], name] for name in _GROWING_OF_HOSTS}
            for of_all in hosts
        ],
    }
