"""What `pregate report` is asked, checked once."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pregate.base.errors import UserError
from pregate.base.options import (
    Adapter,
    CheckpointOrAdapter,
    Device,
    Needs,
    Parent,
    Seed,
    TextField,
    Texts,
    Word,
    check_adapter,
    follow_adapter,
    options,
)

#: Enough to tell methods apart in about a minute on a small model; a decision deserves all of the text.
DEFAULT_MAX_TOKENS = 10_000


@options()
class ReportOptions:
    """What to report on: a routed checkpoint, held-out text, and models to show beside it.

    `parent` is the dense model (None: the one the manifest names if it is found, else the checkpoint with every
    expert on, where that is the same); `tuned_parent` that model tuned as a tuned checkpoint was. Documents are drawn
    with `seed`, which is that of random routing too, until `max_tokens` are scored (None: all of them). An `adapter` in
    place of the model is read with its `parent`.
    """

    model: CheckpointOrAdapter
    out: Annotated[Path, "HTML file to write; must not exist.", Needs("nothing")]
    text: Annotated[Texts, "Held-out text"]
    compare: Annotated[tuple[Path, ...], "Checkpoints or dense models to show beside it.", Needs("model")] = ()
    parent: Parent = None
    tuned_parent: Annotated[
        Path | None, "The dense parent, tuned as a tuned --model was: what its verdict compares with.", Needs("model")
    ] = None
    max_tokens: Annotated[int | None, Field(ge=1), "Measure on at most so many tokens, or all.", Word("all")] = (
        DEFAULT_MAX_TOKENS
    )
    seed: Seed = 0
    device: Device = "auto"
    text_field: TextField = None
    adapter: Adapter = None

    follow = staticmethod(follow_adapter)

    def __post_init__(self) -> None:
        check_adapter(self.model, self.adapter, self.parent)
        if self.out.exists():
            raise UserError.of("--out", self.out, "exists already; allowed: a file that does not exist yet")
        if not self.out.absolute().parent.is_dir():
            raise UserError.of("--out", self.out, "its parent folder does not exist")

    @property
    def command(self) -> str:
        """The command line that asks for this."""
        words = [
            "pregate",
            "report",
            "--model" if self.adapter is None else "--adapter",
            self.model,
            "--out",
            self.out,
            "--text",
            *self.text,
        ]
        words += [word for path in self.compare for word in ("--compare", path)]
        given = {"--parent": self.parent, "--tuned-parent": self.tuned_parent}
        words += [word for option, path in given.items() if path is not None for word in (option, path)]
        words += ["--max-tokens", "all" if self.max_tokens is None else self.max_tokens, "--seed", self.seed]
        words += ["--device", self.device] if self.device != "auto" else []
        words += ["--text-field", self.text_field] if self.text_field is not None else []
        return shlex.join(map(str, words))
