"""Rows to tune on and rows to measure on, and the order in which batches come.

Shape letters: B rows of a batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pregate.base.errors import UserError
from pregate.convert.text.batches import batches
from pregate.convert.text.calibration import Rows, encode
from pregate.convert.text.documents import draw_documents, read_documents

#: No more than this is measured on, however much text there is.
MAX_VALIDATION_TOKENS = 65_536


class TuningRows(Rows):
    """Rows of token ids, each of 2 or more: to tune on, and of other documents to measure on."""

    def describe(self) -> dict[str, Any]:
        return {
            "files": [str(p) for p in self.files],
            "num_rows": len(self.training),
            "num_tokens": sum(map(len, self.training)),
            "num_validation_rows": len(self.held_back),
            "num_validation_tokens": sum(map(len, self.held_back)),
        }


def read_rows(
    paths: Sequence[Path],
    tokenizer: Any,
    length: int,
    validation_share: float,
    seed: int,
    validation: Sequence[Path] = (),
    text_field: str | None = None,
) -> TuningRows:
    """Draw the documents at `paths` with `seed`; the first of them are for validation, in one row each.

    With files of `validation` those are, and no document of `paths`. The rest become rows of at most `length` ids,
    long ones several (see `windows_of`). UserError names the option where there are not enough documents.
    """

    def drawn(paths: Sequence[Path], option: str, least: int) -> tuple[list[list[int]], tuple[Path, ...]]:
        documents = draw_documents(read_documents(paths, length, option, text_field), seed)
        encoded = [ids for d in documents if len(ids := encode(tokenizer, d.text, None)) > 1]
        if len(encoded) < least:
            needed = "a document" if least == 1 else "two documents"
            raise UserError.of(option, " ".join(map(str, paths)), f"needs {needed} of two tokens or more")
        return encoded, tuple(dict.fromkeys(d.source for d in documents))

    kept, files = drawn(paths, "--text", 1 if validation else 2)
    if validation:
        held, _ = drawn(validation, "--validation", 1)
    else:
        num_held = min(len(kept) - 1, max(1, round(validation_share * len(kept))))
        held, kept = kept[:num_held], kept[num_held:]
    training = [window for ids in kept for window in windows_of(ids, length)]
    measured: list[list[int]] = []
    for ids in held:
        if sum(map(len, measured)) < MAX_VALIDATION_TOKENS:
            measured.append(ids[:length])
    return TuningRows(training, measured, files)


def windows_of(ids: list[int], length: int) -> list[list[int]]:
    """Cut a document into rows of at most `length`; each begins with the last id of the one before it.

    So every id but the first is predicted once. Example: [1 2 3 4 5], length 3: [1 2 3], [3 4 5].
    """
    return [ids[at : at + length] for at in range(0, len(ids) - 1, length - 1)]


def spaced(rows: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """Rows evenly spaced over all of them, of about `num_tokens` together and one at least."""
    total = sum(map(len, rows))
    step = max(1.0, total / num_tokens)
    return [rows[int(i * step)] for i in range(max(1, int(len(rows) / step)))]


def spaced_batches(rows: Sequence[list[int]], num_tokens: int) -> list[list[list[int]]]:
    """What `spaced` gives, in batches of like length."""
    chosen = spaced(rows, num_tokens)
    return [[chosen[i] for i in group] for group in batches(chosen)]


class BatchOrder:
    """Batches of rows of like length, shuffled anew each time round; which one comes when follows from `seed` alone.

    So a run that goes on needs to know nothing but how many batches it has had.
    """

    def __init__(self, rows: Sequence[list[int]], batch_tokens: int, seed: int) -> None:
        self._rows, self._batch_tokens, self._seed = rows, batch_tokens, seed
        #: The same each time round: it depends on the rows' lengths alone.
        self.num_batches = sum(1 for _ in batches(rows, batch_tokens))
        self._epoch, self._groups = -1, [[0]]

    def batch(self, index: int) -> list[list[int]]:
        """The rows of batch `index`, counted from 0 through all times round."""
        epoch, place = divmod(index, self.num_batches)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(len(self._rows), generator=generator).tolist()  # rows of one length mix anew
            mixed = batches([self._rows[i] for i in order], self._batch_tokens)
            groups = [[order[i] for i in group] for group in mixed]
            self._epoch = epoch
            self._groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        return [self._rows[i] for i in self._groups[place]]
