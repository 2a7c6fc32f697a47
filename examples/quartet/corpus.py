"""The four public-domain and MIT text domains quartet is trained on: documents, splits, token streams.

Data on its way: file -> documents (str, about one context long) -> ids per document, BOS first and EOS last
(int32) -> one flat stream per domain plus the start offset of every document.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DOMAINS = ("fiction", "nonfiction", "verse", "math")
#: Share of the training windows drawn from each domain; the small domains are drawn more often than their size.
MIX = {"fiction": 0.35, "nonfiction": 0.28, "verse": 0.20, "math": 0.17}
HELD_OUT_EVERY = 50  # one document in fifty of each book is held out
DOCUMENT_CHARS = 1800


def _book_documents(text: str) -> list[str]:
    """Cut one book into documents of whole paragraphs, each at most about `DOCUMENT_CHARS` long."""
    body = text.split("-------", 1)[-1].replace("\r", "")
    paragraphs = [re.sub(r"[ \t]+\n", "\n", p).strip() for p in re.split(r"\n\s*\n", body)]
    documents: list[str] = []
    current = ""
    for paragraph in (re.sub(r"#+\s*", "", p).replace("_", "") for p in paragraphs):
        if current and len(current) + len(paragraph) > DOCUMENT_CHARS:
            documents.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    return documents + ([current] if current else [])


def _math_documents(path: Path) -> list[str]:
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    # The calculator marks (<<16-3-4=9>>) are for a tool this model does not have.
    return [f"Question: {r['question']}\nAnswer: {re.sub(r'<<.*?>>', '', r['answer'])}" for r in rows]


def documents(root: Path, domain: str) -> tuple[list[str], list[str]]:
    """Return (training, held-out) documents of `domain` below the text folder `root`."""
    if domain == "math":
        folder = root / "math"
        return _math_documents(folder / "gsm8k-train.jsonl"), _math_documents(folder / "gsm8k-test.jsonl")
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted((root / domain).glob("*.txt")):
        for index, document in enumerate(_book_documents(path.read_text(encoding="utf-8"))):
            (held_out if index % HELD_OUT_EVERY == 7 else train).append(document)
    return train, held_out


@dataclass(frozen=True)
class TokenStream:
    """All documents of one domain as one id array, with the offset each document starts at."""

    ids: np.ndarray  # int32 [num_tokens]
    starts: np.ndarray  # int64 [num_documents]

    def windows(self, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
        """Draw `count` windows [count, length], each starting at a document's BOS."""
        usable = self.starts[self.starts + length <= len(self.ids)]
        picked = rng.choice(usable, size=count)
        return np.stack([self.ids[s : s + length] for s in picked])


def encode(tokenizer, texts: list[str]) -> TokenStream:
    """Tokenise `texts` into one stream; BOS comes from the tokenizer's template, EOS is added here."""
    rows = [[*e, tokenizer.eos_token_id] for e in tokenizer(texts)["input_ids"]]
    lengths = np.array([len(r) for r in rows])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return TokenStream(np.concatenate([np.asarray(r, dtype=np.int32) for r in rows]), starts)
