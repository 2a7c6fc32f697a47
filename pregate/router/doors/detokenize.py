"""Text from token ids, piece by piece, equal to decoding the whole and never cutting a character.

`tokenizers.DecodeStream` is not used: it raises on byte sequences that are no valid UTF-8 (a model may sample any)
and has no flush, so an unfinished character at the end is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from pregate.router.doors.token_texts import TokenTexts

#: What decoders write for bytes that are not (yet) a character.
_REPLACEMENT = "\ufffd"
#: A prompt given as ids may end inside a character; UTF-8 characters have at most 4 bytes, hence 4 tokens.
_MAX_CHARACTER_TOKENS = 4
#: Where a text ends in bytes that are no character, a cut is looked for among so many places once so many tokens wait.
_MOST_CUTS, _MOST_WAITING = 8, 32
#: Of a prompt so many tokens are decoded, and as many more are looked at for one to begin with.
_TAIL_TOKENS = 16


class Detokenizer:
    """Incremental decoder of one completion.

    The texts of `push` and `flush`, joined, equal `decode(prompt + completion)[len(decode(prompt)):]`, special tokens
    skipped, for every completion. (A prompt that ends inside a character is counted up to that character.)

    Why it is exact: text is released only up to *cuts*, places in the id sequence where the decoded text so far cannot
    change any more whatever follows, and later text is decoded from the cut before the last one, which gives decoders
    that treat the first token specially (SentencePiece strips its space) the context they need. Of a long prompt the
    tail does for that, from a token on whose text is whole.
    """

    def __init__(self, texts: TokenTexts, prompt_ids: Sequence[int]) -> None:
        self._texts = texts
        self._ids = self._spoken(self._tail(prompt_ids))
        self._context = 0  # index of the first id that is still decoded
        self._cut = self._end_of_prompt()
        self._released = texts.of(self._ids[: self._cut])

    def push(self, token_ids: Sequence[int]) -> str:
        """Add new ids; return the text that is certain now and was not returned before, perhaps none."""
        new_ids = self._spoken(token_ids)
        self._ids.extend(new_ids)
        # Two kinds of tokenizer carry single bytes: byte-level ones join them to characters as they come, so the
        # text must not end in U+FFFD; byte-fallback ones (`<0x0A>`) turn a whole run of bytes to U+FFFD when its end
        # is bad, so such a run must be over (a script that the vocabulary spells in bytes streams word by word at
        # best).
        if not new_ids or self._texts.is_byte(new_ids[-1]):
            return ""
        window = self._ids[self._context :]
        text = self._texts.of(window)
        if not text.endswith(_REPLACEMENT):
            return self._release(text, len(window))
        return self._release_begun(window, text) if len(window) > _MOST_WAITING else ""

    def flush(self) -> str:
        """Return the rest at the end of the completion, unfinished characters as U+FFFD."""
        window = self._ids[self._context :]
        return self._release(self._texts.of(window), len(window))

    def _release(self, text: str, num_ids: int) -> str:
        """Return what is new in the text of so many ids of the window, which nothing changes any more."""
        new = text[len(self._released) :]
        if new:
            self._context, self._cut = self._cut, self._context + num_ids
            self._released = self._texts.of(self._ids[self._context : self._cut])
        return new

    def _release_begun(self, window: Sequence[int], text: str) -> str:
        """Of a text that ends in U+FFFD what comes before its last tokens, which alone can still change; else a text
        of bytes would be decoded from its beginning with every token.

        A character that is begun before a cut ends, or is none, with the three tokens after it: where both sides by
        themselves say what the whole does, none goes across.
        """
        last = len(window) - (_MAX_CHARACTER_TOKENS - 1)
        for cut in range(last, max(last - _MOST_CUTS, self._cut - self._context), -1):
            begun = self._texts.of(window[:cut])
            if begun + self._texts.of(window[cut:]) == text:
                return self._release(begun, cut)
        return ""

    def _spoken(self, token_ids: Sequence[int]) -> list[int]:
        """Those that decoding does not pass over."""
        return [token_id for token_id in token_ids if not self._texts.is_silent(token_id)]

    def _tail(self, prompt_ids: Sequence[int]) -> list[int]:
        for start in range(len(prompt_ids) - _TAIL_TOKENS, max(len(prompt_ids) - 2 * _TAIL_TOKENS, 0), -1):
            text = self._texts.alone(prompt_ids[start])
            if text and _REPLACEMENT not in text and not self._texts.is_byte(prompt_ids[start]):
                return list(prompt_ids[start:])
        return list(prompt_ids)

    def _end_of_prompt(self) -> int:
        end = len(self._ids)
        for cut in range(end, max(end - _MAX_CHARACTER_TOKENS, 0), -1):
            if not self._texts.of(self._ids[:cut]).endswith(_REPLACEMENT):
                return cut
        return end
