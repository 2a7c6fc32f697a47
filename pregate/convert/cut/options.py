"""What `pregate convert` is asked, checked once; and named sets of method options: what `--recipe` stands for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pregate.base.choices import Gate, Selection
from pregate.base.errors import UserError, option_name
from pregate.base.options import Device, Dtype, Needs, Out, Restart, Seed, TextField, Texts, Word, described, options

if TYPE_CHECKING:
    from pregate.model.config import LayerCut


@options(kw_only=True)
class Recipe:
    """How neurons are grouped, how the gate is made, and what text it is all measured on. Defaults: recipe `capture`.

    `clustering`: "capture" (`pregate.convert.cut.capture`) or CMoE's "marks" (`pregate.convert.cut.cmoe`).
    `shared_by` chooses the shared neurons: "capture", together with the clusters; "contribution", the greatest mean
    |h| times norm of the down column; "rate", the most often marked. `gate`: "linear", or CMoE's "representative" as
    the released code has it, or "representative-signed" as the paper's text has it. `selection`: "threshold" or
    "top_k" (`pregate.model.gates`). `token_power`: `layers.weighted_mass`.

    CMoE's own: `profile` marks neurons on "cosine" or "raw" activations, `marks_per_token` of them; `distance` between
    a neuron's marks and a centroid, "l1" (the code) or "l2" (the text); `max_iterations` assignments.

    Calibration: `samples` windows of `sequence_length` tokens, drawn with `seed`: "documents", each from a document's
    start, or "stream", anywhere in all documents joined by blank lines.
    """

    clustering: Annotated[Literal["capture", "marks"], "How neurons are grouped; marks is CMoE's."] = "capture"
    shared_by: Annotated[Literal["capture", "contribution", "rate"], "How shared neurons are chosen."] = "capture"
    gate: Annotated[Gate, "linear; CMoE's as its code has it, representative, or its text, -signed."] = "linear"
    selection: Annotated[Selection, "Experts per token: top_k, a fixed number; threshold, a varying one."] = "threshold"
    token_power: Annotated[float, Field(ge=0, le=1), "0 to 1: how much less a token of large activations counts."] = 0.5
    intercept: Annotated[bool, "Give the linear gate a bias."] = True
    profile: Annotated[Literal["cosine", "raw"], "Activations that mark a neuron (CMoE)."] = "cosine"
    marks_per_token: Annotated[int, Field(ge=1), "Neurons a token marks, K_a (CMoE)."] = 10
    distance: Annotated[Literal["l1", "l2"], "Between marks and a centroid (CMoE)."] = "l1"
    max_iterations: Annotated[int, Field(ge=1), "Assignments of --clustering marks."] = 1
    draw: Annotated[Literal["documents", "stream"], "Where windows start."] = "documents"
    samples: Annotated[int, Field(ge=1), "Calibration windows."] = 64
    sequence_length: Annotated[int, Field(ge=2), "Tokens of a window."] = 512
    seed: Seed = 0


#: `capture` assigns neurons to the experts that run when they contribute; `plain` is CMoE's cut with a linear gate;
#: `stock` gives what a stock mixture class can express (see `pregate export`); `cmoe-paper`
#: has the values of the code released with CMoE (arXiv 2502.04416).
RECIPES = {
    "capture": Recipe(),
    "plain": Recipe(clustering="marks", shared_by="contribution", selection="top_k", token_power=0.0),
    "stock": Recipe(selection="top_k", intercept=False),
    "cmoe-paper": Recipe(
        clustering="marks",
        shared_by="rate",
        gate="representative",
        selection="top_k",
        token_power=0.0,
        draw="stream",
        samples=8,
        sequence_length=2048,
    ),
}


@options()
class ConvertOptions(Recipe):
    """How to cut a dense model. `experts` is the total E, `shared` of them always on, `active` of the rest per token.

    `active` 0 makes a static mask: only the shared experts ever run. `shared` None: each layer gets the number of
    shared experts that captures most contribution, and `active` counts them too. `recipe` has the values of the method
    that are not given.
    """

    model: Annotated[Path, Field(description="Model folder, or a GGUF file."), Needs("dense")]
    out: Out
    experts: Annotated[int, Field(ge=1), "Experts per layer, shared ones included."]
    shared: Annotated[int | None, Field(ge=0), "Experts that are always on; auto: found for each layer.", Word("auto")]
    active: Annotated[int, Field(ge=0), "Routed experts per token (on average); shared ones too with auto."]
    calibration: Annotated[Texts, "Text to profile on"]
    recipe: Annotated[
        Literal["capture", "plain", "stock", "cmoe-paper"],
        "A set of defaults of how to cut; the help shows those of capture.",
    ] = "capture"
    dtype: Annotated[Dtype | Literal["auto"], "What weights are stored as; auto: as they were (GGUF: bfloat16)."] = (
        "auto"
    )
    device: Device = "auto"
    restart: Restart = False
    text_field: TextField = None

    @classmethod
    def follow(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The recipe's values where none are given, and what fits to those that are."""
        values = vars(RECIPES[given["recipe"]] if given.get("recipe") in RECIPES else RECIPES["capture"]) | given
        if "selection" not in given and values["gate"] != "linear":
            values["selection"] = "top_k"
        if "shared_by" not in given and values["clustering"] != "capture" and values["shared_by"] == "capture":
            values["shared_by"] = "contribution"
        return values

    def __post_init__(self) -> None:
        if self.shared is None:
            if not 1 <= self.active <= self.experts:
                raise UserError.of("--active", self.active, f"allowed with --shared auto: 1 to {self.experts}")
        elif not 0 <= self.shared < self.experts:
            raise UserError.of("--shared", self.shared, f"allowed: 0 to {self.experts - 1} (below --experts)")
        elif self.shared + self.active > self.experts:
            together = f"with --shared {self.shared} it exceeds --experts {self.experts}"
            raise UserError.of("--active", self.active, f"{together}; allowed: 0 to {self.experts - self.shared}")
        if self.selection == "threshold" and self.gate != "linear":
            raise UserError.of("--selection", self.selection, f"allowed {self._with('gate')}: top_k")
        if self.shared_by == "capture" and self.clustering != "capture":
            raise UserError.of("--shared-by", self.shared_by, f"allowed {self._with('clustering')}: contribution, rate")
        if self.max_iterations != 1 and self.clustering == "capture":
            raise UserError.of("--max-iterations", self.max_iterations, f"allowed {self._with('clustering')}: 1")
        if self.shared is None and self.clustering != "capture":
            raise UserError.of("--shared", "auto", f"allowed {self._with('clustering')}: a number")

    def _with(self, name: str) -> str:
        """What of the method stands against an option: the value itself, or the recipe that has it."""
        value, recipe = getattr(self, name), RECIPES[self.recipe]
        if self.recipe != "capture" and getattr(recipe, name) == value:
            return f"with --recipe {self.recipe}, whose {option_name(name)} is {value}"
        return f"with {option_name(name)} {value}"

    def check_width(self, width: int) -> None:
        """UserError when the experts do not divide an FFN of `width` neurons."""
        if width % self.experts:
            divisors = [str(n) for n in range(1, 129) if width % n == 0]
            reason = f"does not divide the FFN width {width} of {self.model}; allowed: {', '.join(divisors)}"
            raise UserError.of("--experts", self.experts, reason)
        if self.marks_per_token > width:
            raise UserError.of("--marks-per-token", self.marks_per_token, f"allowed: 1 to {width}, the FFN width")

    def cuts(self, width: int) -> list[LayerCut]:
        """The cuts a layer whose FFN has `width` neurons may get: one, or one per number of shared experts.

        UserError as of `check_width`.
        """
        from pregate.model.config import LayerCut

        self.check_width(width)
        size = width // self.experts
        if self.shared is not None:
            return [LayerCut(self.experts - self.shared, self.shared, self.active, size)]
        return [LayerCut(self.experts - shared, shared, self.active - shared, size) for shared in range(self.active)]

    def describe(self) -> dict[str, Any]:
        """What the manifest says: the options, without what says nothing about the result."""
        return described(self)
