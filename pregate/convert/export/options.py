"""What `pregate export` is asked, checked once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pregate.base.errors import UserError
from pregate.base.options import Checkpoint, Device, Dtype, Needs, Out, Parent, TextField, Word, options


@options()
class ExportOptions:
    """What `pregate export` is asked. `text`: held-out text to measure on (none: random tokens).

    `scale`: what the largest weight of every gate becomes (None: each layer's is measured). `dtype`: what is written
    (None: as the checkpoint is stored; for `dense`, as the parent was). `max_tokens` bounds the text measured on.

    An adapter goes with `parent` (None: the one that the manifest names, if it is found). Its `router_table`: the path
    router's table of tokens as it is, which without a projection to make it of is most of the adapter, or nearly so.
    """

    model: Checkpoint
    out: Out
    format: Annotated[
        Literal["qwen2_moe", "dense", "adapter"], "A stock mixture class, the dense parent, or what is added to it."
    ]
    text: Annotated[tuple[Path, ...], "Held-out text to measure on; without, random tokens", Needs("text")] = ()
    scale: Annotated[
        float | None, Field(gt=0, le=1), "Largest weight of every gate.", Word("found by measurement", written=False)
    ] = None
    dtype: Annotated[Dtype | None, "What weights are stored as.", Word("as they are", written=False)] = None
    max_tokens: Annotated[int | None, Field(ge=1), "Measure on at most so many tokens."] = None
    parent: Parent = None
    router_table: Annotated[
        Literal["exact", "int8", "projected"], "An adapter's table of the path router: exact, int8, or projected."
    ] = "exact"
    device: Device = "auto"
    text_field: TextField = None

    def __post_init__(self) -> None:
        text, table = " ".join(map(str, self.text)) or None, None if self.router_table == "exact" else self.router_table
        goes_with = {
            "--text": (text, ("qwen2_moe", "adapter")),
            "--scale": (self.scale, ("qwen2_moe",)),
            "--max-tokens": (self.max_tokens, ("qwen2_moe", "adapter")),
            "--dtype": (self.dtype, ("qwen2_moe", "dense")),
            "--parent": (self.parent, ("adapter",)),
            "--router-table": (table, ("adapter",)),
        }
        for option, (value, formats) in goes_with.items():
            if value is not None and self.format not in formats:
                raise UserError.of(option, value, f"goes with --format {' or '.join(formats)} only")
        if self.max_tokens is not None and not self.text:
            raise UserError.of("--max-tokens", self.max_tokens, "goes with --text only, which it bounds")
