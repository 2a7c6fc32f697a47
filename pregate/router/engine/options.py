"""`EngineOptions`: what an engine may hold and how it computes; loads nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from pregate.base.errors import UserError
from pregate.base.options import Dtype, Key, Word, options
from pregate.base.sizes import SIZE, written

#: Tokens of the KV cache where no memory is asked for, at most; and a block that is allowed whatever the context.
_MOST_TOKENS, _LEAST_BLOCK = 65536, 16


@options()
class EngineOptions:
    """`model` is a checkpoint folder, or an adapter's of the dense model `parent`.

    `kv_cache_memory` bounds all sequences together: bytes above 1, else a fraction of the memory that is free when the
    cache is made; None gives every running sequence its full context, up to 64k, and a block.
    """

    model: str = ""
    parent: str | None = None
    name: Annotated[
        str, Field(description="Name clients know the model by; the folder's if empty."), Key("served_model_name")
    ] = ""
    dtype: Dtype = "float32"
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1, description="Threads of the engine."), Key("engine_threads")] = 1
    max_running: Annotated[int, Field(ge=1, description="Requests that run at the same time.")] = 64
    max_queued: Annotated[int, Field(ge=1, description="Requests that wait for room; more are refused.")] = 256
    step_tokens: Annotated[int, Field(ge=1, description="Tokens of a step, over all requests.")] = 512
    block_size: Annotated[int, Field(ge=1, description="Tokens of a block of the KV cache.")] = 16
    kv_cache_memory: Annotated[
        float | None,
        Field(gt=0, description="The KV cache: bytes, or up to 1 a fraction of free memory."),
        Word("every context, up to 65536 tokens", written=False),
        SIZE,
    ] = None
    prefix_sharing: Annotated[bool, Field(description="Compute equal beginnings of prompts once.")] = True
    batching: Annotated[
        Literal["path", "fifo", "decode-first", "prefill-first"],
        Field(description="Which tokens make a step; path, where there is a path router, the cheapest ones."),
    ] = "fifo"
    max_batching_delay: Annotated[float, Field(gt=0, description="Seconds for which path may pass a request over.")] = (
        0.5
    )
    max_queued_tokens: Annotated[int, Field(ge=1, description="Tokens of prompts that wait.")] = 1 << 22
    max_queued_bytes: Annotated[
        int,
        Field(ge=1, description="Bytes that wait: prompts, their paths and the path router's state; one in any case."),
        SIZE,
    ] = 1 << 30
    pin_cores: Annotated[
        bool, Field(description="Keep engine and hosts each to its own cores; for a machine with one deployment.")
    ] = False
    cuda_graphs: Annotated[bool, Field(description="Capture decode steps on a CUDA device.")] = True
    check_steps: Annotated[bool, Field(description="Check every step's invariants (slow; for debugging).")] = False
    group_timeout_s: Annotated[float, Field(gt=0, description="Seconds a host may take for one group of rows.")] = 30.0

    def check_block_size(self, context: int) -> None:
        """UserError for a block that no text of this context fills."""
        most = max(context, _LEAST_BLOCK)
        if self.block_size > most:
            raise UserError.of("--block-size", self.block_size, f"is more than the context; allowed: 1 to {most}")

    def kv_cache_bytes(self, free: int) -> int | None:
        """Memory for the KV cache where `free` bytes are free; None where it is as its tokens need.

        UserError where more is asked for than is free.
        """
        memory = self.kv_cache_memory
        if memory is None:
            return None
        if memory > max(1, free):
            reason = f"allowed: at most {written(free)}, the memory that is free"
            raise UserError.of("--kv-cache-memory", written(memory), reason)
        return int(memory * free if memory <= 1 else memory)

    def kv_blocks(self, context: int, token_bytes: int, free_bytes: Callable[[], int]) -> int:
        """Blocks of the KV cache, for a model of this context whose every token takes `token_bytes`.

        UserError where the memory asked for is not even one block, or more than is free, or a block is too large.
        """
        self.check_block_size(context)
        if self.kv_cache_memory is None:
            num_tokens = max(context, min(self.max_running * context, _MOST_TOKENS))
            # Large blocks leave no fewer requests to run at once than small ones do.
            return max(-(-num_tokens // self.block_size), min(self.max_running, num_tokens // _LEAST_BLOCK))
        num_bytes = self.kv_cache_bytes(free_bytes())
        assert num_bytes is not None, "it was asked for"
        if num_bytes < self.block_size * token_bytes:
            least = f"{self.block_size * token_bytes} bytes or more, or up to 1 a fraction of what is free"
            raise UserError.of(
                "--kv-cache-memory", written(self.kv_cache_memory), f"less than a block; allowed: {least}"
            )
        return num_bytes // (self.block_size * token_bytes)
