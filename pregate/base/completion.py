"""What a request gives: pieces while it runs, and the whole at its end; the same in a front door and in a client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """What is new since the chunk before: ids, and text that is certain by now (either may be empty)."""

    token_ids: tuple[int, ...]
    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Completion:
    """A finished request. `text` and `token_ids` are the chunks' joined; an end-of-text token is in neither.

    `completion_tokens` counts the end-of-text token when there was one. `rows_per_host[h]`: the (token, layer, expert)
    rows that host h computed for it. `request_id` is the caller's, or made for them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    rows_per_host: tuple[int, ...]
    request_id: str
