"""What `pregate export` is asked, checked once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pregate.base.errors import UserError
from pregate.base.options import Dtype, Model, Needs, Out, TextField, Word, options


@options()
class ExportOptions:
    """What `pregate export` is asked. `text`: held-out text to measure on (none: random tokens).

    `scale`: what the largest weight of every gate becomes (None: each layer's is measured). `dtype`: what is written
    (None: as the checkpoint is stored; for `dense`, as the parent was). `max_tokens` bounds the text measured on.
    """

    model: Model
    out: Out
    format: Annotated[Literal["qwen2_moe", "dense"], "A stock mixture class, or the dense parent again."]
    text: Annotated[tuple[Path, ...], "Held-out text to measure on; without, random tokens", Needs("text")] = ()
    scale: Annotated[
        float | None, Field(gt=0, le=1), "Largest weight of every gate.", Word("found by measurement", written=False)
    ] = None
    dtype: Annotated[Dtype | None, "What weights are stored as.", Word("as they are", written=False)] = None
    max_tokens: Annotated[int | None, Field(ge=1), "Measure on at most so many tokens."] = None
    text_field: TextField = None

    def __post_init__(self) -> None:
        if self.format == "dense":
            text = " ".join(map(str, self.text)) or None
            for option, value in (("--text", text), ("--scale", self.scale), ("--max-tokens", self.max_tokens)):
                if value is not None:
                    raise UserError.of(option, value, "goes with --format qwen2_moe only")
        if self.max_tokens is not None and not self.text:
            raise UserError.of("--max-tokens", self.max_tokens, "goes with --text only, which it bounds")
