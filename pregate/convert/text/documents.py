"""Documents from the text files a user names: `.txt` (books), `.jsonl` (one document per line), folders of both."""

from __future__ import annotations

import glob
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from pregate.base.errors import UserError
from pregate.convert.text.records import record_text

SUFFIXES = (".txt", ".jsonl")
_ALLOWED = f"allowed: {' and '.join(SUFFIXES)} files, or a folder of them"
#: Books are cut into documents of about one context: this many characters per token (measured 3.2 to 4.2 for
#: English), and never more than `MAX_DOCUMENT_TOKENS` tokens' worth, however long the context.
CHARS_PER_TOKEN = 3.5
MAX_DOCUMENT_TOKENS = 2048
#: A paragraph that would fill so many documents is no paragraph: it is cut. (Shorter ones stay whole, as they were in
#: every published number; the longest of 90 books fills 21 documents of 256 tokens.)
LONG_PARAGRAPH = 24
#: After it a text may be cut: closing quotes belong to a sentence; in Chinese and Japanese no space follows.
_SENTENCE_END = re.compile(r"[.!?\u2026]['\"\u201d\u2019)\]]*(?=\s)|[\u3002\uff01\uff1f]|\n")


@dataclass(frozen=True)
class Document:
    """One piece of text and the file it came from."""

    text: str
    source: Path


def text_files(paths: Sequence[Path], option: str) -> list[Path]:
    """Return the text files at `paths`, folders walked and patterns (`*`, `?`, `[]`, `**`) matched, each once, sorted.

    UserError names `option` and the path that is missing, matches nothing, or is of another kind.
    """
    files: set[Path] = set()
    named: list[Path] = []
    for path in paths:  # one that exists is itself, brackets and stars in its name or not
        found = [path] if path.exists() else [Path(p) for p in glob.glob(str(path), recursive=True)]
        if not found:
            reason = "no file matches" if glob.has_magic(str(path)) else "no such path"
            raise UserError.of(option, path, f"{reason}; {_ALLOWED}")
        named += found
    for path in named:
        if path.is_dir():
            files |= {p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()}
        elif path.suffix in SUFFIXES:
            files.add(path)
        else:
            raise UserError.of(option, path, _ALLOWED)
    if not files:
        raise UserError.of(option, " ".join(map(str, paths)), "holds no .txt or .jsonl file")
    return sorted(files)


def read_documents(
    paths: Sequence[Path],
    context_tokens: int,
    option: str,
    text_field: str | None = None,
    whole_paragraphs: bool = False,
) -> list[Document]:
    """Read every document at `paths`, in file order; books are cut into about `context_tokens` each.

    `text_field`: which field of a `.jsonl` record is its text (None: by its form, see `records.py`).
    `whole_paragraphs`: cut no paragraph, however long.
    UserError names `option` and the file where a path is missing, unreadable, or holds no text at all.
    """
    max_chars = int(CHARS_PER_TOKEN * min(context_tokens, MAX_DOCUMENT_TOKENS))
    documents: list[Document] = []
    for path in text_files(paths, option):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError.of(option, path, f"not readable as UTF-8 text ({error})") from error
        if path.suffix == ".jsonl":
            lines = enumerate(text.split("\n"), 1)
            pieces = [record_text(line, f"{path}:{n}", option, text_field) for n, line in lines if line.strip()]
        else:
            pieces = cut_paragraphs(text, max_chars, whole_paragraphs)
        documents += [Document(piece, path) for piece in pieces if piece.strip()]
    if not documents:
        raise UserError.of(
            option, " ".join(map(str, paths)), "holds no text; give .txt or .jsonl files with text in them"
        )
    return documents


def cut_paragraphs(text: str, max_chars: int, whole: bool = False) -> list[str]:
    """Cut at blank lines into pieces of whole paragraphs of at most about `max_chars`.

    A longer paragraph is a piece of its own; one that is the whole text, or fills `LONG_PARAGRAPH` pieces, is cut at
    the ends of its sentences, else between words (unless paragraphs are to be `whole`).
    """
    pieces: list[str] = []
    current = ""
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text.replace("\r", ""))]
    most = max_chars * (1 if sum(map(bool, paragraphs)) == 1 else LONG_PARAGRAPH)
    cut = ([p] if whole or len(p) <= most else cut_sentences(p, max_chars) for p in paragraphs)
    for paragraph in chain.from_iterable(cut):
        if current and len(current) + len(paragraph) > max_chars:
            pieces.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    return pieces + ([current] if current else [])


def cut_sentences(text: str, max_chars: int) -> list[str]:
    """Cut into pieces of at most `max_chars`, each as long as it can be: at the end of a line or sentence, else between
    words where no sentence ends in the second half of a piece, else anywhere. Nothing but space between them is lost.

    In a script of more than a byte to a character, which has more tokens to it, `max_chars` counts bytes.
    Example: "One. Two words." of at most 9: ["One. Two", "words."].
    """
    most = max(1, max_chars * len(text) // len(text.encode()))
    pieces, at = [], 0
    while at < len(text):
        end = min(at + most, len(text))
        if end < len(text):
            least = at + most // 2
            ends = [m.end() for m in _SENTENCE_END.finditer(text, least, end)] or [text.rfind(" ", least, end) + 1]
            end = ends[-1] or end
        pieces.append(text[at:end].strip())
        at = end
    return [piece for piece in pieces if piece]


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
