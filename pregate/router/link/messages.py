"""What front doors and engines say to each other, as frozen dataclasses; `packet.py` carries them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pregate.base.completion import TokenLogprob
from pregate.base.errors import ProtocolError, UserError
from pregate.base.sampling import check_ids, check_logit_bias, check_sampling, check_stop_strings
from pregate.model.packed_paths import PackedPaths

#: What a waiting token counts for.
TOKEN_BYTES = 8


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens. Temperature 0 is greedy; `seed` None draws a fresh one, `repetition_penalty` None is the
    model's own. `stop` and `n` are the front door's, which sends as many requests and reads their text.

    In this order: `logit_bias` is added to the logits; `repetition_penalty` divides or multiplies those of every token
    of prompt and text; `presence_penalty`, and `frequency_penalty` times its count, are taken from each token of the
    text; up to `min_tokens` nothing ends it; temperature; the `top_k` likeliest; of these the likeliest of together
    `top_p`; of these who has at least `min_p` of the likeliest's probability. `logprobs`, `prompt_logprobs`: of each
    token, and of that many likeliest ones beside it (None: of none).
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1

    def validate(self, vocab_size: int) -> None:
        """Raise the UserError that every entrance prints for a value out of range."""
        check_sampling(self)
        check_stop_strings(self.stop)
        check_logit_bias(self.logit_bias, vocab_size)
        if len(self.stop_token_ids) > vocab_size:
            raise UserError.of("stop_token_ids", f"of {len(self.stop_token_ids)} ids", f"allowed: at most {vocab_size}")
        check_ids("stop_token_ids", self.stop_token_ids, vocab_size)


def check_prompt(token_ids: Sequence[int], *, vocab_size: int, max_context: int) -> None:
    """Raise UserError unless the prompt holds 1 to `max_context - 1` ids of the vocabulary."""
    if not token_ids:
        raise UserError.of("prompt", "of 0 tokens", f"must hold 1 to {max_context - 1} tokens")
    if len(token_ids) >= max_context:
        sentence = f"longer than the context of {max_context} tokens allows; allowed: 1 to {max_context - 1} tokens"
        raise UserError.of("prompt", f"of {len(token_ids)} tokens", sentence)
    check_ids("prompt token id", token_ids, vocab_size)


@dataclass(frozen=True)
class PackedState:
    """A path router's `PathState`: float64 little-endian of `shape`, [P, 2 * num_blocks, C], and its counts."""

    data: bytes
    shape: tuple[int, int, int]
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(self.shape) < 0 or len(self.data) != 8 * math.prod(self.shape):
            raise ProtocolError(f"path state of {len(self.data)} bytes does not hold float64 of shape {self.shape}")


@dataclass(frozen=True)
class SubmitRequest:
    """Generate from a prompt, the last `num_generated` of whose tokens this request has generated before, on an engine
    that is gone: it goes on as if unbroken. `deadline_s` counts from the moment the engine takes the request; what is
    computed of equal prompts is shared under the same `cache_salt`, which names who asks. Of those that wait, those of
    the lowest `priority` come first. `called` is the caller's name of the request, for logs; two may have the same.
    Its spans are parts of what `traceparent` names.

    `paths` are the prompt's and `path_state` is the path router's after it, where the path service has computed them:
    both or none.
    """

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline_s: float | None = None
    cache_salt: str = ""
    paths: PackedPaths | None = None
    path_state: PackedState | None = None
    priority: int = 0
    num_generated: int = 0
    called: str = ""
    traceparent: str = ""

    def __post_init__(self) -> None:
        if (self.paths is None) != (self.path_state is None):
            raise ProtocolError("a request brings its paths with the state after them, or neither")

    @property
    def num_bytes(self) -> int:
        """What it holds while it waits, as `--max-queued-bytes` counts: its tokens, their paths and the state."""
        brought = self.paths.nbytes + len(self.path_state.data) if self.paths and self.path_state else 0
        return TOKEN_BYTES * len(self.token_ids) + brought


@dataclass(frozen=True)
class CancelRequest:
    """The caller is gone; unknown ids are ignored. No event follows."""

    request_id: str


@dataclass(frozen=True)
class RouteRequest:
    """Ask for the paths of a prompt, without a forward pass; `with_state`: and for the path router's state after it.

    `deadline_s` counts from the moment the request is taken; `called` and `traceparent` are as in
    `SubmitRequest`.
    """

    request_id: str
    token_ids: tuple[int, ...]
    deadline_s: float | None = None
    with_state: bool = False
    called: str = ""
    traceparent: str = ""

    @property
    def num_bytes(self) -> int:
        return TOKEN_BYTES * len(self.token_ids)


@dataclass(frozen=True)
class InfoRequest:
    """Ask what the engine serves and how busy it is."""

    request_id: str


@dataclass(frozen=True)
class KeepAlive:
    """Sent by a door twice a second; `sender` is its incarnation, `request_ids` are those it waits for.

    One that the engine does not know (it was restarted, or had given the door up) is answered with a FailedEvent; one
    that the engine runs for this door but the door does not list is cancelled.
    """

    sender: str
    request_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Heartbeat:
    """Sent by an engine's I/O thread twice a second, also while a step runs; `sender` is its incarnation.

    `progress` counts what the compute thread has done; `busy_with` is what it does now (None: nothing), for `busy_s`
    already. `unavailable` says why the engine takes no requests.
    """

    sender: str
    progress: int
    busy_with: str | None
    busy_s: float
    unavailable: str | None = None


@dataclass(frozen=True)
class TokensEvent:
    """New tokens of one request, in order; their logprobs where they were asked for, and once the prompt's."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


#: The `reason` of a request that was ended from outside, by its front door.
ABORTED = "abort"


@dataclass(frozen=True)
class FinishedEvent:
    """The one last event of a request that ran; `reason` is stop, length, deadline or ABORTED.

    `rows_per_host[h]` counts the (token, layer, expert) rows that host h computed for this request. It waited `queue_s`
    for its first step, `prefill_s` from there for its first token, and came to its end `decode_s` later; the rest is as
    in `Completion`.
    """

    request_id: str
    reason: str
    prompt_tokens: int
    completion_tokens: int
    rows_per_host: tuple[int, ...]
    unit_hits: int = 0
    unit_misses: int = 0
    stall_s: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class FailedEvent:
    """The one last event of a request that was refused or failed; `code` is a gRPC status name (base/errors.py)."""

    request_id: str
    code: str
    message: str


@dataclass(frozen=True)
class RouteReply:
    """A prompt's paths, and the state after it where it was asked for. `version` names the path router's checkpoint."""

    request_id: str
    paths: PackedPaths
    state: PackedState | None
    version: str


@dataclass(frozen=True)
class InfoReply:
    """What `Engine.info` returned, and what the link adds: the fields of a Heartbeat."""

    request_id: str
    info: dict[str, Any]


EngineBound: TypeAlias = SubmitRequest | CancelRequest | RouteRequest | InfoRequest | KeepAlive
Event: TypeAlias = TokensEvent | FinishedEvent | FailedEvent
DoorBound: TypeAlias = Event | RouteReply | InfoReply | Heartbeat
Message: TypeAlias = EngineBound | DoorBound
