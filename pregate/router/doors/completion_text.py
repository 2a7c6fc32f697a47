"""`CompletionText`: one completion in the making, from an engine's events to chunks of text and its end."""

from __future__ import annotations

from collections.abc import Sequence

from pregate.base.completion import Chunk, Completion, TokenLogprob
from pregate.router.doors.detokenize import Detokenizer
from pregate.router.doors.stop_strings import StopStrings
from pregate.router.doors.token_texts import TokenTexts
from pregate.router.link.messages import ABORTED, FinishedEvent, SubmitRequest, TokensEvent


class CompletionText:
    """Detokenises, looks for stop strings, and keeps what the Completion repeats.

    With stop strings it takes token by token, so that where a text ends does not depend on how many tokens an event
    brings. `stopped`: a stop string has ended it, and what the engine goes on with is nobody's.
    """

    def __init__(self, texts: TokenTexts, request: SubmitRequest, stop: Sequence[str], index: int) -> None:
        self.stopped = False
        self._num_prompt = len(request.token_ids) - request.num_generated
        self._detokenizer = Detokenizer(texts, request.token_ids[: self._num_prompt])
        self._stop = StopStrings(stop) if stop else None
        self._min_tokens = request.sampling.min_tokens
        self._index = index
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def push(self, event: TokensEvent) -> Chunk | None:
        """Take new tokens; return what is new, up to the end if this was it."""
        self._prompt_logprobs += event.prompt_logprobs
        if self._stop is None:
            ids, text = event.token_ids, self._detokenizer.push(event.token_ids) if event.token_ids else ""
        else:
            ids, text = self._push_singly(event.token_ids, self._stop)
        self._token_ids.extend(ids)
        self._logprobs.extend(event.logprobs[: len(ids)])
        return self._chunk(ids, text, event.logprobs[: len(ids)], event.prompt_logprobs)

    def flush(self) -> Chunk | None:
        """The engine has ended it: what text is left."""
        text = self._detokenizer.flush()
        if self._stop is not None:
            ends = len(self._token_ids) >= self._min_tokens
            text, self.stopped = self._stop.push(text, ends=ends)
            text += self._stop.flush()
        return self._chunk((), text, (), ())

    def completion(self, request_id: str, end: FinishedEvent | None) -> Completion:
        """The whole; `end` is the engine's last event, None where a stop string came first."""
        counted = None if end is None or end.reason == ABORTED else end
        return Completion(
            "".join(self._texts),
            tuple(self._token_ids),
            "stop" if end is None or self.stopped else end.reason,
            self._num_prompt,
            len(self._token_ids) if counted is None else counted.completion_tokens,
            () if counted is None else counted.rows_per_host,
            request_id,
            self._index,
            tuple(self._logprobs),
            self._prompt_logprobs,
            *((0, 0, 0.0) if counted is None else (counted.unit_hits, counted.unit_misses, counted.stall_s)),
        )

    def _push_singly(self, token_ids: Sequence[int], stop: StopStrings) -> tuple[tuple[int, ...], str]:
        texts = []
        for number, token_id in enumerate(token_ids, start=1):
            ends = len(self._token_ids) + number >= self._min_tokens
            text, self.stopped = stop.push(self._detokenizer.push((token_id,)), ends=ends)
            texts.append(text)
            if self.stopped:
                return tuple(token_ids[:number]), "".join(texts)
        return tuple(token_ids), "".join(texts)

    def _chunk(
        self,
        ids: tuple[int, ...],
        text: str,
        logprobs: tuple[TokenLogprob, ...],
        prompt_logprobs: tuple[TokenLogprob, ...],
    ) -> Chunk | None:
        self._texts.append(text)
        if not (ids or text or prompt_logprobs):
            return None
        num = len(self._token_ids)
        return Chunk(ids, text, self._num_prompt, num, self._index, logprobs, prompt_logprobs)
