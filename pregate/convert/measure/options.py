"""What `pregate evaluate` is asked, checked once."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pregate.base.errors import UserError
from pregate.base.options import (
    Adapter,
    Device,
    ModelOrAdapter,
    Parent,
    TextField,
    Texts,
    check_adapter,
    follow_adapter,
    options,
)


@options()
class EvaluateOptions:
    """What `pregate evaluate` is asked: a model folder (dense or routed), files of text, and how much of it at most.

    Documents are drawn with `seed` (None: 0), which is that of random routing too, from every folder of `text` alike.
    With `controls` a routed model is scored once more by each routing it is to be compared with; `parent` is the
    dense model it came from (None: the one its manifest names if it is found, else the model itself with every expert
    on, where that is the same). An `adapter` in place of the model is read with its `parent`.
    """

    model: ModelOrAdapter
    text: Annotated[Texts, "Text to score"]
    max_tokens: Annotated[int | None, Field(ge=1), "Score at most so many tokens."] = None
    controls: Annotated[bool, "Score the model by other routings as well."] = False
    parent: Parent = None
    seed: Annotated[int | None, Field(ge=0), "Seed of random routing and of what --max-tokens leaves out."] = None
    device: Device = "auto"
    text_field: TextField = None
    adapter: Adapter = None

    follow = staticmethod(follow_adapter)

    def __post_init__(self) -> None:
        check_adapter(self.model, self.adapter, self.parent)
        if self.parent is not None and not self.controls and self.adapter is None:
            raise UserError.of("--parent", self.parent, "needs --controls or --adapter")
        if self.seed is not None and not self.controls and self.max_tokens is None:
            raise UserError.of("--seed", self.seed, "needs --controls or --max-tokens")
