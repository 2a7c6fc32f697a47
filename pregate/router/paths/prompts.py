"""`Prompts`: those whose paths are being computed, a chunk of some of them at a time. One thread, no sockets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pregate.base.errors import DeadlineError, PregateError, QueueFullError, UserError
from pregate.base.log import get_logger
from pregate.base.memory import out_of_memory_fails
from pregate.model.packed_paths import PackedPaths
from pregate.model.path_computer import PathComputer, PathState
from pregate.model.path_router import CHUNK_TOKENS
from pregate.router.link.messages import FailedEvent, PackedState, RouteReply, RouteRequest, check_prompt
from pregate.router.paths.options import PathOptions

logger = get_logger(__name__)
#: Tokens of a turn, padding included: what comes meanwhile waits for no more than this.
TURN_TOKENS = 4 * CHUNK_TOKENS


@dataclass(eq=False)
class _Prompt:
    request: RouteRequest
    deadline_s: float | None  # monotonic
    num_bytes: int
    state: PathState
    paths: PackedPaths | None = None

    @property
    def num_left(self) -> int:
        return len(self.request.token_ids) - (0 if self.paths is None else self.paths.num_tokens)

    @property
    def num_next(self) -> int:
        return min(self.num_left, CHUNK_TOKENS)


class Prompts:
    """Takes prompts of up to `context` tokens, in the order they come, and answers each exactly once.

    A turn is one chunk of several prompts, of about the same length so that little is padding. Every other turn is of
    the prompt that has least left, so that a short one does not wait for long ones; the turns between are of the
    oldest, so that a long one is not kept waiting by short ones.
    """

    def __init__(
        self,
        computer: PathComputer,
        options: PathOptions,
        context: int,
        version: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._computer, self._options, self._context, self._version = computer, options, context, version
        self._vocab_size = computer.router.embedding.num_embeddings
        self._max_id = max((cut.num_routed for cut in computer.cuts), default=0) - 1
        none = computer.no_paths()
        _, num_layers, k = none.ids.shape
        self._token_bytes = 8 + num_layers * (1 + k * (none.ids.itemsize + 4 * (none.weights is not None)))
        self._clock = clock
        self._prompts: dict[str, _Prompt] = {}  # oldest first
        self._num_turns = 0

    def __len__(self) -> int:
        return len(self._prompts)

    def info(self) -> dict[str, int | str]:
        """What is served and what waits, in plain types."""
        num_bytes = sum(prompt.num_bytes for prompt in list(self._prompts.values()))  # read by another thread
        return {"version": self._version, "num_queued": len(self), "queued_bytes": num_bytes}

    def add(self, request: RouteRequest, arrived_s: float) -> None:
        """Take a prompt. Raises UserError for a bad one, QueueFullError at either bound."""
        check_prompt(request.token_ids, vocab_size=self._vocab_size, max_context=self._context + 1)
        if request.request_id in self._prompts:
            raise UserError.of("request id", request.request_id, "waits already; use a new one")
        num_bytes = self._token_bytes * len(request.token_ids)  # of its paths at their longest
        if num_bytes > self._options.max_bytes:
            sentence = f"needs {num_bytes} bytes for its paths; allowed: {self._options.max_bytes} (--path-max-bytes)"
            raise UserError.of("prompt", f"of {len(request.token_ids)} tokens", sentence)
        held = sum(prompt.num_bytes for prompt in self._prompts.values())
        if len(self) >= self._options.max_prompts or held + num_bytes > self._options.max_bytes:
            raise QueueFullError(f"{len(self)} prompts of {held} bytes wait for their paths; try again later")
        deadline_s = None if request.deadline_s is None else arrived_s + request.deadline_s
        self._prompts[request.request_id] = _Prompt(request, deadline_s, num_bytes, self._computer.new_state())

    def cancel(self, request_id: str) -> None:
        """Drop a prompt; unknown ids are ignored."""
        self._prompts.pop(request_id, None)

    def clear(self) -> None:
        """Drop all."""
        self._prompts.clear()

    def turn(self) -> list[RouteReply | FailedEvent]:
        """Compute a chunk of some prompts; returns the answers of those that have ended."""
        now_s = self._clock()
        late = [p for p in self._prompts.values() if p.deadline_s is not None and p.deadline_s <= now_s]
        ended: list[RouteReply | FailedEvent] = self._fail(late, DeadlineError("the deadline passed"))
        chosen = self._choose()
        if not chosen:
            return ended
        try:
            with out_of_memory_fails():
                self._extend(chosen)
        except PregateError as error:
            logger.error("the paths of %d prompts failed: %s", len(chosen), error)
            return ended + self._fail(chosen, error)
        return ended + [self._answer(prompt) for prompt in chosen if not prompt.num_left]

    def _choose(self) -> list[_Prompt]:
        self._num_turns += 1
        waiting = list(self._prompts.values())
        if not waiting:
            return []
        first = waiting[0] if self._num_turns % 2 else min(waiting, key=lambda prompt: prompt.num_left)
        longest = first.num_next
        alike = [p for p in waiting if p is not first and longest // 2 <= p.num_next <= longest]
        return [first, *alike[: max(0, TURN_TOKENS // longest - 1)]]

    def _extend(self, chosen: Sequence[_Prompt]) -> None:
        pieces = [p.request.token_ids[len(p.request.token_ids) - p.num_left :][: p.num_next] for p in chosen]
        paths, states = self._computer.extend([prompt.state for prompt in chosen], pieces)
        for prompt, path, state in zip(chosen, paths, states, strict=True):
            prompt.state = state
            if prompt.paths is None:
                prompt.paths = PackedPaths.of(path, self._max_id)
            else:
                prompt.paths.append(path)

    def _answer(self, prompt: _Prompt) -> RouteReply:
        request, paths = prompt.request, prompt.paths
        assert paths is not None
        del self._prompts[request.request_id]
        state = pack_state(prompt.state) if request.with_state else None
        return RouteReply(request.request_id, paths, state, self._version)

    def _fail(self, prompts: Sequence[_Prompt], error: PregateError) -> list[RouteReply | FailedEvent]:
        for prompt in prompts:
            del self._prompts[prompt.request.request_id]
        return [FailedEvent(prompt.request.request_id, error.code, str(error)) for prompt in prompts]


def pack_state(state: PathState) -> PackedState:
    """`state` for the wire."""
    num_tokens, num_parts, dim = state.kept.shape
    data = state.kept.cpu().numpy().astype("<f8", copy=False).tobytes()
    return PackedState(data, (num_tokens, num_parts, dim), tuple(state.counts.tolist()))
