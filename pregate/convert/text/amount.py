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
