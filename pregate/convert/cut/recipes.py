"""Named sets of method options: what `--recipe` stands for."""

from __future__ import annotations

from dataclasses import dataclass

CLUSTERINGS = ("capture", "marks")
SHARED_BY = ("capture", "contribution", "rate")
PROFILES = ("cosine", "raw")
DISTANCES = ("l1", "l2")
DRAWS = ("documents", "stream")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How neurons are grouped, how the gate is made, and what text it is all measured on. Defaults: recipe `capture`.

    `clustering`: "capture" (`pregate.convert.cut.capture`) or CMoE's "marks" (`pregate.convert.cut.clustering`).
    `shared_by` chooses the shared neurons: "capture", together with the clusters; "contribution", the greatest mean
    |h| times norm of the down column; "rate", the most often marked. `gate`: "linear", or CMoE's "representative" as
    the released code has it, or "representative-signed" as the paper's text has it. `selection`: "threshold" or
    "top_k" (`pregate.model.gates`). `token_power`, 0 to 1: how much less a token of large activations counts
    (`layers.weighted_mass`). `intercept`: whether the linear gate has a bias.

    CMoE's own: `profile` marks neurons on "cosine" or "raw" activations, `marks_per_token` of them (K_a); `distance`
    between a neuron's marks and a centroid, "l1" (the code) or "l2" (the text); `max_iterations` assignments.

    Calibration: `samples` windows of `sequence_length` tokens, drawn with `seed`: "documents", each from a document's
    start, or "stream", anywhere in all documents joined by blank lines.
    """

    clustering: str = "capture"
    shared_by: str = "capture"
    gate: str = "linear"
    selection: str = "threshold"
    token_power: float = 0.5
    intercept: bool = True
    profile: str = "cosine"
    marks_per_token: int = 10
    distance: str = "l1"
    max_iterations: int = 1
    draw: str = "documents"
    samples: int = 64
    sequence_length: int = 512
    seed: int = 0


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
