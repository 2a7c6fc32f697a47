"""`HostOptions`: how a host computes; loads nothing heavy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pregate.base.options import INTERNAL, Dtype, Word, options
from pregate.base.sizes import SIZE

#: `kernels.expert_ffn.IMPLEMENTATIONS`, which cannot be asked here: it loads torch. A test holds them equal.
EXPERT_FFNS = ("auto", "packed", "grouped", "loop", "int8", "stored", "triton", "triton-int8", "triton-fp8")
ResidentExperts = Annotated[
    float | None,
    Field(gt=0, description="Experts a host keeps on its device: a count, below 1 a share of its own, else bytes."),
    Word("all", written=False),
    SIZE,
]
HostMemory = Annotated[
    int, Field(ge=0, description="Bytes of host memory for experts that are not on the device."), SIZE
]


@options()
class HostOptions:
    """How a host computes. `dtype` auto is float32 on cpu, bfloat16 on cuda; `num_plans` is kept per engine."""

    host_id: Annotated[int, INTERNAL] = 0
    device: str = "cpu"
    dtype: Dtype | Literal["auto"] = "auto"
    expert_ffn: Annotated[str, Field(description=f"How hosts run experts: {', '.join(EXPERT_FFNS)}.")] = "auto"
    num_plans: Annotated[int, Field(ge=1, description="Plans of steps that a host keeps for an engine.")] = 4
    spare_slots: Annotated[
        int | None,
        Field(ge=0, description="Slots a host keeps for units of other hosts; at least what one layer may need."),
        Word("auto", written=False),
    ] = None
    resident_experts: ResidentExperts = None
    host_memory: HostMemory = 0
    lookahead: Annotated[
        bool, Field(description="Fetch experts before they are asked for, and keep those that are needed next.")
    ] = True
    max_rows: Annotated[int, Field(ge=1, description="Rows that a host takes in one group.")] = 8192
