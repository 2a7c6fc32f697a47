"""`HostOptions`: how a host computes; loads nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pregate.base.errors import UserError


@dataclass(frozen=True)
class HostOptions:
    """How a host computes. `dtype` auto is float32 on cpu, bfloat16 on cuda; `num_plans` is kept per engine."""

    host_id: int = 0
    device: str = "cpu"
    dtype: str = "auto"
    expert_ffn: str = "auto"
    num_plans: int = 4
    max_rows: int = 8192

    def __post_init__(self) -> None:
        if self.num_plans < 1 or self.max_rows < 1:
            raise UserError.of("host options", asdict(self), "num_plans and max_rows must be 1 or more")
