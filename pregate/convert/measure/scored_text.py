"""Text to score a model on: documents drawn from files, as the model's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pregate.convert.measure.scoring import encode_all
from pregate.convert.text.documents import draw_documents, read_documents
from pregate.model.folder import ModelFolder


@dataclass(frozen=True)
class ScoredText:
    """`rows`: a document's ids each, of at most `context`; `num_bytes` of text are scored, and at most `max_tokens`.

    `texts` are all documents in the order drawn.
    """

    rows: list[list[int]]
    texts: list[str]
    num_bytes: int
    context: int
    max_tokens: int | None

    @classmethod
    def read(
        cls, model: ModelFolder, paths: Sequence[Path], max_tokens: int | None, seed: int, text_field: str | None = None
    ) -> ScoredText:
        """Draw documents of `paths` with `seed`, from every folder alike, until `max_tokens` are scored (None: all).

        UserError for text that cannot be read; `amount.check_scored` refuses what gives nothing to score.
        """
        context = model.context_tokens
        texts = [d.text for d in draw_documents(read_documents(paths, context, "--text", text_field), seed)]
        rows, num_bytes = encode_all(model.tokenizer, texts, context, max_tokens)
        return cls(rows, texts, num_bytes, context, max_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens that are scored."""
        return sum(len(row) - 1 for row in self.rows)

    def check_same_tokens(self, other: ModelFolder) -> None:
        """UserError where another model reads the text as other tokens; then perplexities do not compare."""
        context = other.context_tokens
        longest = max(map(len, self.rows))
        if context < longest:
            raise other.refuse(f"its context of {context} tokens is shorter than a document ({longest})")
        if encode_all(other.tokenizer, self.texts, self.context, self.max_tokens)[0] != self.rows:
            raise other.refuse("reads the text as other tokens, so perplexities do not compare")
