"""Named sets of method options: what `--recipe` stands for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pregate.base.choices import Gate, Selection
from pregate.base.options import Seed, options


@options(kw_only=True)
class Recipe:
    """How neurons are grouped, how the gate is made, and what text it is all measured on. Defaults: recipe `capture`.

    `clustering`: "capture" (`pregate.convert.cut.capture`) or CMoE's "marks" (`pregate.convert.cut.clustering`).
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
