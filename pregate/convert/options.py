"""What `pregate convert` is asked, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pregate.base.errors import UserError
from pregate.convert.cmoe import SHARED_BY
from pregate.model.config import GATES, LayerCut

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ConvertOptions:
    """How to cut a dense model. `experts` is the total E, `shared` of them always on, `active` of the rest per token.

    `active` 0 makes a static mask: only the shared experts ever run. `calibration`: .txt or .jsonl files, or
    folders of them; `samples` windows of `sequence_length` tokens (cut to the model's context) are drawn from it
    with `seed`. `dtype` is what weights are stored as. `marks_per_token` and `max_iterations` are CMoE's K_a and
    number of cluster assignments; the defaults are those of its released code. `device`: auto (a GPU when there is
    one), cpu, cuda or cuda:N. `restart` discards what an interrupted conversion left beside `out`.
    """

    model: Path
    out: Path
    experts: int
    shared: int
    active: int
    calibration: tuple[Path, ...]
    gate: str = "linear"
    shared_by: str = "contribution"
    samples: int = 64
    sequence_length: int = 512
    seed: int = 0
    dtype: str = "float32"
    marks_per_token: int = 10
    max_iterations: int = 1
    device: str = "auto"
    restart: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("gate", GATES), ("shared_by", SHARED_BY), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise UserError.of(_option(name), getattr(self, name), f"allowed: {', '.join(allowed)}")
        lowest = {"experts": 1, "shared": 0, "active": 0, "samples": 1, "sequence_length": 2, "seed": 0}
        for name, least in (lowest | {"marks_per_token": 1, "max_iterations": 1}).items():
            if getattr(self, name) < least:
                raise UserError.of(_option(name), getattr(self, name), f"allowed: {least} or more")
        if self.shared >= self.experts:
            raise UserError.of("--shared", self.shared, f"allowed: 0 to {self.experts - 1} (below --experts)")
        if self.shared + self.active > self.experts:
            allowed = f"allowed: 0 to {self.experts - self.shared}"
            together = f"with --shared {self.shared} it exceeds --experts {self.experts}"
            raise UserError.of("--active", self.active, f"{together}; {allowed}")
        if not self.calibration:
            raise UserError("--calibration: give at least one .txt or .jsonl file, or a folder of them")

    def cut(self, width: int) -> LayerCut:
        """The cut of a layer whose FFN has `width` neurons; UserError when the experts do not divide it."""
        if width % self.experts:
            divisors = [str(n) for n in range(1, 129) if width % n == 0]
            reason = f"does not divide the FFN width {width} of {self.model}; allowed: {', '.join(divisors)}"
            raise UserError.of("--experts", self.experts, reason)
        if self.marks_per_token > width:
            raise UserError.of("marks per token", self.marks_per_token, f"allowed: 1 to {width}, the FFN width")
        return LayerCut(self.experts - self.shared, self.shared, self.active, width // self.experts)

    def describe(self) -> dict[str, Any]:
        fields = asdict(self) | {"model": str(self.model), "out": str(self.out)}
        del fields["restart"]  # says nothing about the result
        return fields | {"calibration": [str(p) for p in self.calibration]}


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")
