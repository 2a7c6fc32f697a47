"""`PromptReader`: a text, a chat or token ids become the ids of a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeAlias

from tokenizers import Tokenizer

from pregate.base.errors import UserError
from pregate.model.tokenizer import text_bytes
from pregate.router.doors.chat import Chat, ChatTemplate

#: What is to be continued: a text, a chat, or token ids.
Prompt: TypeAlias = str | Chat | Sequence[int]
#: A text above this is tokenised beside the event loop, so that other streams do not wait for it.
_LONG_TEXT_BYTES = 4096
#: Tokens of ordinary text have about 4 bytes: more than this on average, and its beginning is looked at first.
_BYTES_PER_TOKEN = 16


class PromptReader:
    """Knows a model's tokenizer and chat template. `token_bytes`: as long as a token gets."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate) -> None:
        self._tokenizer, self._chat_template = tokenizer, chat_template
        self.token_bytes = max(len(token.encode()) for token in tokenizer.get_vocab())

    async def encode(self, prompt: Prompt, max_tokens: int, special: bool | None = None) -> tuple[int, ...]:
        """Return the prompt's ids. A text that is far too long for `max_tokens` is refused by its bytes, or by its
        beginning, before it is tokenised."""
        if isinstance(prompt, (bytes, bytearray, memoryview)):
            raise UserError.of("prompt", f"of {type(prompt).__name__}", "must be text or a list of token ids")
        if not isinstance(prompt, (str, Chat)):
            return tuple(prompt)
        special = isinstance(prompt, str) if special is None else special  # a chat's template writes its own
        text = prompt if isinstance(prompt, str) else self._chat_template.render(prompt)
        num_bytes = text_bytes(text, "prompt")
        if num_bytes <= _LONG_TEXT_BYTES:
            return tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)
        most = max_tokens * self.token_bytes
        if num_bytes > most:
            sentence = f"longer than {max_tokens} tokens can hold; allowed: {most} bytes"
            raise UserError.of("prompt", f"of {num_bytes} bytes", sentence)
        beginning = text[: max_tokens * _BYTES_PER_TOKEN]
        if (
            len(beginning) < len(text)
            and len(await self._encode_aside(beginning, special=special)) > max_tokens * 9 // 8
        ):
            sentence = f"its first {len(beginning)} characters alone exceed the {max_tokens} tokens allowed"
            raise UserError.of("prompt", f"of {num_bytes} bytes", sentence)
        return await self._encode_aside(text, special=special)

    async def _encode_aside(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Tokenise in a thread. `encode` would keep Python's lock there, and with it every other stream;
        `encode_batch` gives it up."""
        (encoding,) = await asyncio.to_thread(self._tokenizer.encode_batch, [text], add_special_tokens=special)
        return tuple(encoding.ids)
