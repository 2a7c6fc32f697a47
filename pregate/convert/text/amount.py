"""How much text is enough: too little is refused before any work, little is said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pregate.base.errors import UserError
from pregate.convert.progress import Progress

#: Tokens to measure or train on: below the first a figure says nothing; from the second on nothing is said.
LEAST_TOKENS = 100
ENOUGH_TO_MEASURE = 5_000
ENOUGH_TO_TRAIN = 20_000


def check_scored(
    rows: Sequence[list[int]], asked: int | None, option: str, paths: Sequence[Path], progress: Progress
) -> None:
    """`check_amount` of rows to measure on, whose first ids are not scored; as little as is `asked` for will do."""
    enough = min(ENOUGH_TO_MEASURE, asked or ENOUGH_TO_MEASURE)
    num_tokens = sum(len(row) - 1 for row in rows)
    check_amount(num_tokens, enough, option, paths, progress, min(LEAST_TOKENS, enough))


def check_learned(
    rows: Sequence[list[int]], asked: int, option: str, paths: Sequence[Path], progress: Progress
) -> None:
    """`check_amount` of rows to train on; as little as is `asked` for will do, and half of it at the least."""
    enough = min(ENOUGH_TO_TRAIN, asked)
    check_amount(sum(map(len, rows)), enough, option, paths, progress, min(LEAST_TOKENS, enough // 2))


def check_amount(
    num_tokens: int, enough: int, option: str, paths: Sequence[Path], progress: Progress, least: int = LEAST_TOKENS
) -> None:
    """UserError that names `option` where there are fewer than `least` tokens; a note where fewer than `enough`."""
    where = " ".join(map(str, paths))
    if num_tokens < least:
        few = "no document of two tokens or more" if num_tokens < 2 else f"{num_tokens:,} tokens of text"
        raise UserError.of(option, where, f"holds {few}; {least:,} are the least, {enough:,} are enough")
    if num_tokens < enough:
        progress.note(f"{option} {where}: {num_tokens:,} tokens of text are few; {enough:,} are enough")
