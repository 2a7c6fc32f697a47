"""`/v1/completions`: texts that go on, for one prompt or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from pregate.base.completion import Completion, TokenLogprob
from pregate.router.doors.http.answering import Item

#: What JSON can say of a token that is impossible.
LEAST_LOGPROB = -9999.0


class CompletionShape:
    """OpenAI's `text_completion`, with `token_ids` beside each text.

    `word`: a token's text, where logprobs are asked for. `echoed`: of each prompt, where it is to be repeated, its text
    and its first id (of which there is no logprob); `n` completions come of each. `only_echo`: nothing else is shown.
    """

    kind = chunk_kind = "text_completion"

    def __init__(
        self,
        word: Callable[[int], str] | None,
        echoed: Sequence[tuple[str, int]] = (),
        *,
        n: int = 1,
        only_echo: bool = False,
    ) -> None:
        self._word, self._echoed, self._n, self._only_echo = word, echoed, n, only_echo
        self._lengths: dict[int, int] = {}  # characters of each choice so far

    def whole(self, completion: Completion) -> dict[str, Any]:
        return self._choice(completion, finish_reason=self._reason(completion))

    def pieces(self, item: Item) -> list[dict[str, Any]]:
        if not isinstance(item, Completion):
            return [self._choice(item, finish_reason=None)]
        end = {"index": item.index, "text": "", "token_ids": [], "logprobs": None}
        return [{**end, "finish_reason": self._reason(item)}]

    def counted(self, completion: Completion) -> int:
        return 0 if self._only_echo else completion.completion_tokens

    def _reason(self, completion: Completion) -> str:
        return "length" if self._only_echo else completion.finish_reason

    def _choice(self, item: Item, finish_reason: str | None) -> dict[str, Any]:
        text, ids, tokens = ("", (), ()) if self._only_echo else (item.text, item.token_ids, item.logprobs)
        start = self._lengths.get(item.index)
        if self._echoed:
            prompt, first_id = self._echoed[item.index // self._n]
            tokens = item.prompt_logprobs + tuple(tokens)
            if start is None:
                text, tokens = prompt + text, (TokenLogprob(first_id, math.nan), *tokens)
        self._lengths[item.index] = (start or 0) + len(text)
        choice = {"index": item.index, "text": text, "token_ids": list(ids)}
        choice["logprobs"] = self._logprobs(tokens, start or 0) if self._word and tokens else None
        if self._word and item.prompt_logprobs and not self._echoed:
            choice["prompt_logprobs"] = self._logprobs(item.prompt_logprobs, 0)
        return {**choice, "finish_reason": finish_reason}

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        """OpenAI's lists; tokens are named by their text, which is not theirs alone, and by their ids."""
        assert self._word is not None
        words = [self._word(t.token_id) for t in tokens]
        offsets = [offset]
        for word in words[:-1]:
            offsets.append(offsets[-1] + len(word))
        return {
            "tokens": words,
            "token_logprobs": [_value(t.logprob) for t in tokens],
            "top_logprobs": [self._top(t) for t in tokens],
            "text_offset": offsets,
            "token_ids": [t.token_id for t in tokens],
            "top_token_ids": [[i for i, _ in t.top] for t in tokens],
        }

    def _top(self, token: TokenLogprob) -> dict[str, float | None] | None:
        """The likeliest tokens and the token itself; of two with one text, the likelier."""
        assert self._word is not None
        if math.isnan(token.logprob):
            return None
        found = {self._word(token.token_id): _value(token.logprob)}
        return found | {self._word(i): _value(value) for i, value in reversed(token.top)}


def _value(logprob: float) -> float | None:
    return None if math.isnan(logprob) else max(logprob, LEAST_LOGPROB)
