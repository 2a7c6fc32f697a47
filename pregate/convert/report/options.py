"""What `pregate report` is asked, checked once."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from pregate.base.errors import UserError

#: Enough to tell methods apart in about a minute on a small model; a decision deserves all of the text.
DEFAULT_MAX_TOKENS = 10_000


@dataclass(frozen=True)
class ReportOptions:
    """What to report on: a routed checkpoint, held-out text, and models to show beside it.

    `parent` is the dense model (None: the one the manifest names if it is found, else the checkpoint with every
    expert on, where that is the same); `tuned_parent` that model tuned as a tuned checkpoint was. Documents are drawn
    with `seed`, which is that of random routing too, until `max_tokens` are scored (None: all of them).
    """

    model: Path
    out: Path
    text: tuple[Path, ...]
    compare: tuple[Path, ...] = ()
    parent: Path | None = None
    tuned_parent: Path | None = None
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    seed: int = 0
    text_field: str | None = None

    def __post_init__(self) -> None:
        if not self.text:
            raise UserError("--text: give held-out text, at least one .txt or .jsonl file or a folder of them")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError.of("--max-tokens", self.max_tokens, "allowed: 1 or more, or all")
        if self.seed < 0:
            raise UserError.of("--seed", self.seed, "allowed: 0 or more")
        if self.out.exists():
            raise UserError.of("--out", self.out, "exists already; allowed: a file that does not exist yet")
        if not self.out.absolute().parent.is_dir():
            raise UserError.of("--out", self.out, "its parent folder does not exist")

    @property
    def command(self) -> str:
        """The command line that asks for this."""
        words = ["pregate", "report", "--model", self.model, "--out", self.out, "--text", *self.text]
        words += [word for path in self.compare for word in ("--compare", path)]
        given = {"--parent": self.parent, "--tuned-parent": self.tuned_parent}
        words += [word for option, path in given.items() if path is not None for word in (option, path)]
        words += ["--max-tokens", "all" if self.max_tokens is None else self.max_tokens, "--seed", self.seed]
        words += ["--text-field", self.text_field] if self.text_field is not None else []
        return shlex.join(map(str, words))
