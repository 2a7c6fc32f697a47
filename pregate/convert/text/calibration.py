"""Token ids to calibrate on: documents encoded with BOS, and windows packed from them.

Shape letters: S windows, N tokens of a window.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pregate.base.errors import UserError
from pregate.convert.progress import QUIET, Progress
from pregate.convert.text.documents import draw_documents, read_documents
from pregate.model.file_hashes import short_digest

#: What names the text, in errors.
OPTION = "--calibration"
#: Share of the windows kept back from calibration to measure the result on, and their greatest number.
HELD_BACK_SHARE = 8
MAX_HELD_BACK = 16
#: Of fewer windows none would be left to measure on.
LEAST_WINDOWS = 4


def encode(tokenizer: Any, text: str, max_tokens: int | None) -> list[int]:
    """Token ids of one document: BOS (where the tokenizer has one) first, cut to `max_tokens` (None: whole)."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return (bos + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[:max_tokens]


@dataclass(frozen=True)
class Rows:
    """Rows of token ids to learn from, of other text to measure on, and where they came from."""

    training: list[list[int]]
    held_back: list[list[int]]
    files: tuple[Path, ...] = ()

    def digest(self) -> str:
        """Sixteen hex digits that tell other text apart."""
        return short_digest([self.training, self.held_back])


class Calibration(Rows):
    """Windows of one length, to calibrate on and to measure on."""

    @property
    def windows(self) -> torch.Tensor:
        """Those to calibrate on, int64."""
        return torch.tensor(self.training, dtype=torch.int64)

    def describe(self) -> dict[str, Any]:
        return {
            "files": [str(p) for p in self.files],
            "num_windows": len(self.training),
            "window_tokens": len(self.training[0]),
            "num_tokens": sum(map(len, self.training)),
            "num_held_back_windows": len(self.held_back),
        }


def pack_windows(rows: Iterator[list[int]], length: int, count: int) -> list[list[int]]:
    """Join documents into at most `count` windows of `length` ids; each starts at a document's start.

    Example: documents [1 5 6], [1 7], [1 8 9], length 4: windows [1 5 6 1] (the second document is cut) and
    nothing more, as [1 8 9] alone is too short.
    """
    windows: list[list[int]] = []
    current: list[int] = []
    for row in rows:
        current = current + row
        if len(current) >= length:
            windows.append(current[:length])
            current = []
        if len(windows) == count:
            break
    if not windows and len(current) > 1:
        windows.append(current)  # a text shorter than one window is one short window
    return windows


def stream_windows(
    ids: list[int], length: int, count: int, num_held_back: int, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """`count` windows of `length` ids from anywhere in `ids`, then at most `num_held_back` that overlap none of them.

    All of `ids` is one window where it is shorter. The first are drawn as CMoE's released code draws them.
    """
    if len(ids) <= length + 1:
        return ([ids[:length]] if len(ids) > 1 else []), []
    rng = random.Random(seed)
    starts = [rng.randint(0, len(ids) - length - 1) for _ in range(count)]
    tried = (rng.randint(0, len(ids) - length - 1) for _ in range(100 * num_held_back))
    free = [at for at in tried if all(abs(at - start) >= length for start in starts)][:num_held_back]
    return [ids[at : at + length] for at in starts], [ids[at : at + length] for at in free]


def read_calibration(
    paths: Sequence[Path],
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    draw: str = "documents",
    text_field: str | None = None,
    progress: Progress = QUIET,
) -> Calibration:
    """Draw `samples` windows of `length` tokens with `seed`, and some more to measure on, from the files at `paths`.

    `draw` "documents": each starts at a document's start; text that yields fewer windows is used whole. "stream":
    each starts anywhere in the documents joined by blank lines (as CMoE's released code draws them).
    UserError where there is no text, or too little; where there is less than asked for, that is noted.
    """
    with progress.doing("reading text"):
        documents = read_documents(paths, length, OPTION, text_field, whole_paragraphs=draw == "stream")
        files = tuple(dict.fromkeys(d.source for d in documents))
        wanted = min(MAX_HELD_BACK, max(1, samples // HELD_BACK_SHARE))
        if draw == "stream":
            ids = encode(tokenizer, "\n\n".join(d.text for d in documents), None)
            kept, held_back = stream_windows(ids, length, samples, wanted, seed)
            found = len(ids) // length
        else:
            drawn = draw_documents(documents, seed)
            windows = pack_windows((encode(tokenizer, d.text, length) for d in drawn), length, samples + wanted)
            found = sum(len(window) == length for window in windows)
            held = min(wanted, max(len(windows) // 4, 1), max(len(windows) - 1, 0))
            kept, held_back = windows[held:][:samples], windows[:held]
    _check_windows(found, samples + wanted, length, paths, progress)
    if not held_back:
        progress.note(f"{OPTION}: windows are all over the text; none is left beside them to measure perplexity on")
    return Calibration(kept, held_back, files)


def _check_windows(found: int, wanted: int, length: int, paths: Sequence[Path], progress: Progress) -> None:
    """UserError where text gives too few windows of `length` tokens; a note where it gives fewer than are `wanted`."""
    where, enough = " ".join(map(str, paths)), f"about {wanted * length:,} tokens are enough for {wanted}"
    windows = f"{'no window' if not found else '1 window' if found == 1 else f'{found} windows'} of {length} tokens"
    least = min(LEAST_WINDOWS, wanted)
    if found < least:
        reason = f"its text gives {windows}; {least} are the least ({least * length:,} tokens), {enough}"
        raise UserError.of(OPTION, where, f"{reason}; a smaller --sequence-length needs less")
    if found < wanted:
        progress.note(f"{OPTION} {where}: its text gives {windows} only; {enough}")


def encode_pool(
    texts: Sequence[str], tokenizer: Any, length: int, total_tokens: float, num_given: int = 0
) -> Iterator[list[int]]:
    """Encode texts in order, each cut to `length`, until there are `total_tokens`; one-token ones are left out.

    The first `num_given` (0 or 1) of each do not count.
    """
    left = total_tokens
    for text in texts:
        if left + num_given < 2:
            return
        ids = encode(tokenizer, text, int(min(length, left + num_given)))
        if len(ids) > 1:
            left -= len(ids) - num_given
            yield ids
