"""Documents from the text files a user names: `.txt` (books), `.jsonl` (one document per line), folders of both."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pregate.base.errors import UserError

SUFFIXES = (".txt", ".jsonl")
#: Books are cut into documents of about one context: this many characters per token (measured 3.2 to 4.2 for
#: English), and never more than `MAX_DOCUMENT_TOKENS` tokens' worth, however long the context.
CHARS_PER_TOKEN = 3.5
MAX_DOCUMENT_TOKENS = 2048


@dataclass(frozen=True)
class Document:
    """One piece of text and the file it came from."""

    text: str
    source: Path


def text_files(paths: Sequence[Path], option: str) -> list[Path]:
    """Return the text files at `paths`, folders walked, each once and sorted; UserError names `option`."""
    files: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise UserError.of(option, path, "no such path")
        if path.is_dir():
            files |= {p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()}
        elif path.suffix in SUFFIXES:
            files.add(path)
        else:
            raise UserError.of(option, path, f"allowed: {' and '.join(SUFFIXES)} files, or a folder of them")
    if not files:
        raise UserError.of(option, " ".join(map(str, paths)), "holds no .txt or .jsonl file")
    return sorted(files)


def read_documents(paths: Sequence[Path], context_tokens: int, option: str) -> list[Document]:
    """Read every document at `paths`, in file order; books are cut at paragraphs into about `context_tokens` each.

    UserError names `option` and the file where a path is missing, unreadable, or holds no text at all.
    """
    max_chars = int(CHARS_PER_TOKEN * min(context_tokens, MAX_DOCUMENT_TOKENS))
    documents: list[Document] = []
    for path in text_files(paths, option):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError.of(option, path, f"not readable as UTF-8 text ({error})") from error
        pieces = _lines(text, path, option) if path.suffix == ".jsonl" else cut_paragraphs(text, max_chars)
        documents += [Document(piece, path) for piece in pieces if piece.strip()]
    if not documents:
        raise UserError.of(
            option, " ".join(map(str, paths)), "holds no text; give .txt or .jsonl files with text in them"
        )
    return documents


def cut_paragraphs(text: str, max_chars: int) -> list[str]:
    """Cut at blank lines into pieces of whole paragraphs of at most about `max_chars`; no paragraph is split."""
    pieces: list[str] = []
    current = ""
    for paragraph in (p.strip() for p in re.split(r"\n\s*\n", text.replace("\r", ""))):
        if current and len(current) + len(paragraph) > max_chars:
            pieces.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    return pieces + ([current] if current else [])


def _lines(text: str, path: Path, option: str) -> list[str]:
    return [_record_text(line, f"{path}:{n}", option) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def _record_text(line: str, where: str, option: str) -> str:
    """The text of one jsonl record: "text", or "question" and "answer", or its first string."""
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise UserError.of(option, where, f"not a JSON record ({error})") from error
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return record["text"]
        if isinstance(record.get("question"), str) and isinstance(record.get("answer"), str):
            return f"Question: {record['question']}\nAnswer: {record['answer']}"
        for value in record.values():
            if isinstance(value, str):
                return value
    raise UserError.of(option, where, 'a record needs a "text" field, or "question" and "answer"')


def draw_documents(documents: Sequence[Document], seed: int) -> list[Document]:
    """Shuffle with `seed` and interleave by folder, so that a small domain beside a large one is not drowned.

    Example: folders a (3 documents) and b (1) come out as a, b, a, a in some seeded order within each.
    """
    rng = random.Random(seed)
    folders: dict[Path, list[Document]] = {}
    for document in documents:
        folders.setdefault(document.source.parent, []).append(document)
    for group in folders.values():
        rng.shuffle(group)
    return [d for row in zip_longest(*folders.values()) for d in row if d is not None]
