"""Names of methods that options, configs and commands share."""

from __future__ import annotations

from typing import Literal

#: Of a model: any; a dense one; a checkpoint of `convert`; one whose gates alone know experts; one with a path router.
Kind = Literal["model", "dense", "routed", "layerwise", "path router"]
Gate = Literal["linear", "representative", "representative-signed"]
Selection = Literal["top_k", "threshold"]
#: Of a path router: its heads, what chooses in training, and what a chosen expert weighs.
Heads = Literal["independent", "recurrent", "single"]
RouterGate = Literal["scores", "dselect"]
RouterWeights = Literal["one", "learned"]
#: What a path router learns; see `convert/paths/losses.py`.
RouterTarget = Literal["mass", "relative", "sets", "paper", "captured"]
