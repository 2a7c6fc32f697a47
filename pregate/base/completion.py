"""What a request gives: pieces while it runs, and the whole at its end; the same in a front door and in a client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model itself held a token, as a natural logarithm: before bias, penalties and temperature.

    `top` are the likeliest tokens in its place with theirs, the likeliest first, as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """What is new since the chunk before: ids, and text that is certain by now (either may be empty).

    `logprobs` are those of `token_ids` where they were asked for. `prompt_logprobs`, of the prompt's second token on,
    come once. `index` says which of `n` completions it belongs to.
    """

    token_ids: tuple[int, ...]
    text: str
    prompt_tokens: int
    completion_tokens: int
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A finished request. `text`, `token_ids` and logprobs are the chunks' joined; an end-of-text token is in none of
    them, and a stop string is not in the text, though the tokens that spell it are in the ids.

    `completion_tokens` counts the end-of-text token when there was one. `rows_per_host[h]`: the (token, layer, expert)
    rows that host h computed for it (empty where a stop string ended it: the front door did). `request_id` is the
    caller's, or made for them.

    While it ran hosts were asked for units so often that were in their slots (`unit_hits`) and that were not, and
    computing waited `stall_s` for these: for all requests together, and 0 where all experts are held.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    rows_per_host: tuple[int, ...]
    request_id: str
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    unit_hits: int = 0
    unit_misses: int = 0
    stall_s: float = 0.0
