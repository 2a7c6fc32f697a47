"""Text from token ids, piece by piece, equal to decoding the whole and never cutting a character.

`tokenizers.DecodeStream` is not used: it raises on byte sequences that are no valid UTF-8 (a model may sample any)
and has no flush, so an unfinished character at the end is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

#: What decoders write for bytes that are not (yet) a character.
_REPLACEMENT = "\ufffd"
#: A prompt given as ids may end inside a character; UTF-8 characters have at most 4 bytes, hence 4 tokens.
_MAX_CHARACTER_TOKENS = 4


class Detokenizer:
    """Incremental decoder of one completion.

    The texts of `push` and `flush`, joined, equal `decode(prompt + completion)[len(decode(prompt)):]`, special tokens
    skipped, for every completion. (A prompt that ends inside a character is counted up to that character.)

    Why it is exact: text is released only up to *cuts*, places in the id sequence where the decoded text so far cannot
    change any more whatever follows, and later text is decoded from the cut before the last one, which gives decoders
    that treat the first token specially (SentencePiece strips its space) the context they need.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids)
        self._context = 0  # index of the first id that is still decoded
        self._cut = self._end_of_prompt()
        self._released = self._decode(self._ids[: self._cut])

    def push(self, token_ids: Sequence[int]) -> str:
        """Add new ids; return the text that is certain now and was not returned before, perhaps none."""
        self._ids.extend(token_ids)
        return self._release() if self._is_cut() else ""

    def flush(self) -> str:
        """Return the rest at the end of the completion, unfinished characters as U+FFFD."""
        return self._release()

    def _release(self) -> str:
        text = self._decode(self._ids[self._context :])
        new = text[len(self._released) :]
        if new:
            self._context, self._cut = self._cut, len(self._ids)
            self._released = self._decode(self._ids[self._context :])
        return new

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def _is_cut(self) -> bool:
        # Two kinds of tokenizer carry single bytes: byte-level ones join them to characters as they come, so the
        # text must not end in U+FFFD; byte-fallback ones (`<0x0A>`) turn a whole run of bytes to U+FFFD when its end
        # is bad, so such a run must be over (a script that the vocabulary spells in bytes streams word by word at
        # best). Special tokens are skipped and do not end a run.
        window = self._ids[self._context :]
        for token_id in reversed(window):
            if self._is_byte(token_id):
                return False
            if self._decode([token_id]):
                break
        return not self._decode(window).endswith(_REPLACEMENT)

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.id_to_token(token_id)
        return token is not None and len(token) == 6 and token.startswith("<0x")

    def _end_of_prompt(self) -> int:
        end = len(self._ids)
        for cut in range(end, max(end - _MAX_CHARACTER_TOKENS, 0), -1):
            if not self._decode(self._ids[:cut]).endswith(_REPLACEMENT):
                return cut
        return end
