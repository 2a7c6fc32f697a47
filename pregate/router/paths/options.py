"""`PathOptions`: what the path service may hold and how it computes; loads nothing heavy."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pregate.base.options import Key, options
from pregate.base.sizes import SIZE


@options()
class PathOptions:
    """`model` is a checkpoint folder whose paths are exact, or an adapter's of the dense model `parent`."""

    model: str = ""
    parent: str | None = None
    threads: Annotated[int, Field(ge=1, description="Threads of the path service."), Key("path_threads")] = 1
    max_prompts: Annotated[
        int, Field(ge=1, description="Prompts that wait for their paths; more are refused."), Key("path_max_prompts")
    ] = 256
    max_bytes: Annotated[
        int, Field(ge=1, description="Bytes of those prompts and their paths."), Key("path_max_bytes"), SIZE
    ] = 1 << 30
