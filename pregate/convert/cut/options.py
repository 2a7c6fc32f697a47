"""What `pregate convert` is asked, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pregate.base.errors import UserError, option_name
from pregate.convert.cut.recipes import CLUSTERINGS, DISTANCES, DRAWS, PROFILES, RECIPES, SHARED_BY, Recipe
from pregate.model.config import GATES, SELECTIONS, LayerCut

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ConvertOptions(Recipe):
    """How to cut a dense model. `experts` is the total E, `shared` of them always on, `active` of the rest per token.

    `active` 0 makes a static mask: only the shared experts ever run. `shared` None: each layer gets the number of
    shared experts that captures most contribution, and `active` counts them too. `calibration`: .txt or .jsonl files,
    or folders of them; `samples` windows of `sequence_length` tokens (cut to the model's context) are drawn from it
    with `seed`. `dtype` is what weights are stored as. `device`: auto (a GPU when there is one), cpu, cuda or cuda:N.
    `restart` discards what an interrupted conversion left beside `out`. Everything else is the method; see `Recipe`.
    """

    model: Path
    out: Path
    experts: int
    shared: int | None
    active: int
    calibration: tuple[Path, ...]
    dtype: str = "float32"
    device: str = "auto"
    restart: bool = False
    text_field: str | None = None

    def __post_init__(self) -> None:
        choices = {"gate": GATES, "selection": SELECTIONS, "clustering": CLUSTERINGS, "shared_by": SHARED_BY}
        choices |= {"profile": PROFILES, "distance": DISTANCES, "draw": DRAWS, "dtype": DTYPES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError.of(option_name(name), getattr(self, name), f"allowed: {', '.join(allowed)}")
        lowest = {"experts": 1, "active": 0, "samples": 1, "sequence_length": 2, "seed": 0}
        for name, least in (lowest | {"marks_per_token": 1, "max_iterations": 1}).items():
            if getattr(self, name) < least:
                raise UserError.of(option_name(name), getattr(self, name), f"allowed: {least} or more")
        if not 0 <= self.token_power <= 1:
            raise UserError.of("--token-power", self.token_power, "allowed: 0 to 1")
        self._check_counts()
        self._check_method()
        if not self.calibration:
            raise UserError("--calibration: give at least one .txt or .jsonl file, or a folder of them")

    @classmethod
    def of_recipe(cls, recipe: str, method: dict[str, Any], **fields: Any) -> ConvertOptions:
        """Options of the named recipe, with what `method` gives in place of its values; UserError for another name."""
        if recipe not in RECIPES:
            raise UserError.of("--recipe", recipe, f"allowed: {', '.join(RECIPES)}")
        return cls(**(asdict(RECIPES[recipe]) | method | fields))

    def _check_counts(self) -> None:
        if self.shared is None:
            if not 1 <= self.active <= self.experts:
                raise UserError.of("--active", self.active, f"allowed with --shared auto: 1 to {self.experts}")
            return
        if not 0 <= self.shared < self.experts:
            raise UserError.of("--shared", self.shared, f"allowed: 0 to {self.experts - 1} (below --experts)")
        if self.shared + self.active > self.experts:
            allowed = f"allowed: 0 to {self.experts - self.shared}"
            together = f"with --shared {self.shared} it exceeds --experts {self.experts}"
            raise UserError.of("--active", self.active, f"{together}; {allowed}")

    def _check_method(self) -> None:
        if self.selection == "threshold" and self.gate != "linear":
            raise UserError.of("--selection", self.selection, f"allowed with --gate {self.gate}: top_k")
        if self.shared_by == "capture" and self.clustering != "capture":
            allowed = "contribution, rate"
            raise UserError.of("--shared-by", self.shared_by, f"allowed with --clustering {self.clustering}: {allowed}")
        if self.max_iterations != 1 and self.clustering == "capture":
            raise UserError.of("--max-iterations", self.max_iterations, "allowed with --clustering capture: 1")
        if self.shared is None and self.clustering != "capture":
            raise UserError.of("--shared", "auto", f"allowed with --clustering {self.clustering}: a number")

    def cuts(self, width: int) -> list[LayerCut]:
        """The cuts a layer whose FFN has `width` neurons may get: one, or one per number of shared experts.

        UserError when the experts do not divide it.
        """
        if width % self.experts:
            divisors = [str(n) for n in range(1, 129) if width % n == 0]
            reason = f"does not divide the FFN width {width} of {self.model}; allowed: {', '.join(divisors)}"
            raise UserError.of("--experts", self.experts, reason)
        if self.marks_per_token > width:
            raise UserError.of("--marks-per-token", self.marks_per_token, f"allowed: 1 to {width}, the FFN width")
        size = width // self.experts
        if self.shared is not None:
            return [LayerCut(self.experts - self.shared, self.shared, self.active, size)]
        return [LayerCut(self.experts - shared, shared, self.active - shared, size) for shared in range(self.active)]

    def describe(self) -> dict[str, Any]:
        fields = asdict(self) | {"model": str(self.model), "out": str(self.out)}
        del fields["restart"]  # says nothing about the result
        return fields | {"calibration": [str(p) for p in self.calibration]}
