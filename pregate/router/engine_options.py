"""`EngineOptions`: what an engine may hold and how it computes; loads nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from pregate.base.errors import UserError


@dataclass(frozen=True)
class EngineOptions:
    """`kv_tokens` bounds all sequences together; None gives every running sequence its full context, up to 64k."""

    model: str
    name: str = ""
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    max_running: int = 64
    max_queued: int = 256
    step_tokens: int = 512
    block_size: int = 16
    kv_tokens: int | None = None
    group_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("threads", "max_running", "max_queued", "step_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise UserError.of(f"engine option {name}", getattr(self, name), "must be 1 or more")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise UserError.of("--dtype", self.dtype, "allowed: float32, float16, bfloat16")

    def kv_capacity(self, context: int) -> int:
        """Tokens the KV cache holds for a model of this context."""
        return self.kv_tokens or max(context, min(self.max_running * context, 65536))
