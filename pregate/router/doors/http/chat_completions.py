"""`/v1/chat/completions`: the assistant's next message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pregate.base.completion import Completion, TokenLogprob
from pregate.router.doors.http.answering import Item
from pregate.router.doors.http.completions import LEAST_LOGPROB


class ChatShape:
    """OpenAI's `chat.completion` and, streamed, `chat.completion.chunk`. `word`: a token's text, where logprobs are
    asked for."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, word: Callable[[int], str] | None) -> None:
        self._word = word
        self._opened: set[int] = set()

    def whole(self, completion: Completion) -> dict[str, Any]:
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        logprobs = self._logprobs(completion.logprobs)
        choice = {"index": completion.index, "message": message, "logprobs": logprobs}
        return {**choice, "finish_reason": completion.finish_reason}

    def pieces(self, item: Item) -> list[dict[str, Any]]:
        """The first says whose message it is."""
        deltas: list[tuple[dict[str, Any], Any, str | None]] = []
        if item.index not in self._opened:
            self._opened.add(item.index)
            deltas.append(({"role": "assistant", "content": "", "refusal": None}, None, None))
        if isinstance(item, Completion):
            deltas.append(({}, None, item.finish_reason))
        elif item.text or (self._word and item.logprobs):
            deltas.append(({"content": item.text}, self._logprobs(item.logprobs), None))
        return [
            {"index": item.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            for delta, logprobs, reason in deltas
        ]

    def counted(self, completion: Completion) -> int:
        return completion.completion_tokens

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._word is None:
            return None
        content = [
            {**self._token(t.token_id, t.logprob), "top_logprobs": [self._token(i, value) for i, value in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        """A token's bytes are not told where it is a piece of a character."""
        assert self._word is not None
        word = self._word(token_id)
        whole = None if "\ufffd" in word else list(word.encode())
        return {"token": word, "logprob": max(logprob, LEAST_LOGPROB), "bytes": whole}
