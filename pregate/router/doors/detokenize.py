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
        self._ids = self._tail(prompt_ids)
        self._context = 0  # index of the first id that is still decoded
        self._cut = self._end_of_prompt()
        self._released = texts.of(self._ids[: self._cut])

    def push(self, token_ids: Sequence[int]) -> str:
        """Add new ids; return the text that is certain now and was not returned before, perhaps none."""
        self._ids.extend(token_ids)
        # Two kinds of tokenizer carry single bytes: byte-level ones join them to characters as they come, so the
        # text must not end in U+FFFD; byte-fallback ones (`<0x0A>`) turn a whole run of bytes to U+FFFD when its end
        # is bad, so such a run must be over (a script that the vocabulary spells in bytes streams word by word at
        # best).
        window = self._ids[self._context :]
        if self._ends_in_byte(window):
            return ""
        text = self._texts.of(window)
        return "" if text.endswith(_REPLACEMENT) else self._release(text)

    def flush(self) -> str:
        """Return the rest at the end of the completion, unfinished characters as U+FFFD."""
        return self._release(self._texts.of(self._ids[self._context :]))

    def _release(self, text: str) -> str:
        new = text[len(self._released) :]
        if new:
            self._context, self._cut = self._cut, len(self._ids)
            self._released = self._texts.of(self._ids[self._context :])
        return new

    def _ends_in_byte(self, token_ids: Sequence[int]) -> bool:
        """Special tokens are skipped and do not end a run."""
        for token_id in reversed(token_ids):
            if self._texts.is_byte(token_id):
                return True
            if self._texts.alone(token_id):
                break
        return False

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
