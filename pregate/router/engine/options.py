"""`EngineOptions`: what an engine may hold and how it computes; loads nothing heavy."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pregate.base.options import Dtype, Key, Word, options


@options()
class EngineOptions:
    """`model` is a checkpoint folder. `kv_tokens` bounds all sequences together; None gives every running sequence its
    full context, up to 64k."""

    model: str = ""
    name: Annotated[
        str, Field(description="Name clients know the model by; the folder's if empty."), Key("served_model_name")
    ] = ""
    dtype: Dtype = "float32"
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1, description="Threads of the engine."), Key("engine_threads")] = 1
    max_running: Annotated[int, Field(ge=1, description="Requests that run at the same time.")] = 64
    max_queued: Annotated[int, Field(ge=1, description="Requests that wait for them; more are refused.")] = 256
    step_tokens: Annotated[int, Field(ge=1, description="Tokens of a step, over all requests.")] = 512
    block_size: Annotated[int, Field(ge=1, description="Tokens of a block of the KV cache.")] = 16
    kv_tokens: Annotated[
        int | None,
        Field(ge=1, description="Tokens the KV cache holds."),
        Word("every context, up to 65536", written=False),
    ] = None
    group_timeout_s: Annotated[float, Field(gt=0, description="Seconds a host may take for one group of rows.")] = 30.0

    def kv_capacity(self, context: int) -> int:
        """Tokens the KV cache holds for a model of this context."""
        return self.kv_tokens or max(context, min(self.max_running * context, 65536))
