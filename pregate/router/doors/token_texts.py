"""`TokenTexts`: what token ids say. Single tokens come again and again, so what they say is kept."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from tokenizers import Tokenizer

#: Tokens of which is kept what they say.
_KEPT = 1 << 14


class TokenTexts:
    """One tokenizer's. `alone`: a token's text, none of a special one; `word`: that of a special one too; `is_byte`:
    whether it is one byte that the vocabulary has no character for (`<0x0A>`); `is_silent`: whether it is a special
    one, or none of the vocabulary, as if it were not there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        kept = functools.lru_cache(_KEPT)
        self.alone = kept(lambda token_id: self._decode([token_id]))
        self.word = kept(lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False))
        self.is_byte = kept(self._is_byte)
        special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.is_silent = kept(lambda token_id: token_id in special or tokenizer.id_to_token(token_id) is None)

    def of(self, token_ids: Sequence[int]) -> str:
        """Their text, without special tokens."""
        return self.alone(token_ids[0]) if len(token_ids) == 1 else self._decode(list(token_ids))

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.id_to_token(token_id)
        return token is not None and len(token) == 6 and token.startswith("<0x")
