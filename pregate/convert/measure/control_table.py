"""The controls beside a routed checkpoint: the same text, the same active share, other ways to choose.

Data on its way: rows of ids -> per control one scoring run (`score_rows`) with a policy in use and a meter -> its
figures: perplexity, ratio to dense, bits per byte, active share measured, and how often it picks the oracle's experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from pregate.convert.measure.agreement import AgreementMeter
from pregate.convert.measure.controls import AllPolicy, OraclePolicy, RandomPolicy, static_mask
from pregate.convert.measure.scoring import Score, score_rows
from pregate.convert.progress import QUIET, Progress
from pregate.model.layers import GatePolicy, RoutingPolicy
from pregate.model.modeling import RoutedForCausalLM

DENSE, STATIC = "dense parent", "static mask"
RANDOM, PAPER, ORACLE_FIXED = "random routing", "paper's gate", "oracle, fixed number"
FIXED = (RANDOM, PAPER, ORACLE_FIXED)
LINEAR, READ, PATH, ORACLE = "linear gate", "read network", "path router", "oracle"


def own_name(model: RoutedForCausalLM) -> str:
    """The row of the routing that `model` is served with."""
    if model.config.routing == "path":
        return PATH
    return {"linear": LINEAR, "read": READ}.get(model.config.gate, PAPER)


def control_rows(
    model: RoutedForCausalLM,
    rows: Sequence[list[int]],
    num_bytes: int,
    parent: Any = None,
    seed: int = 0,
    progress: Progress = QUIET,
    only: Collection[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Score `rows` by every routing `model` can be compared with; name -> figures, in the order of a table.

    `parent` is the dense model, or what it scored before; None: `model` with every expert on, which must be the same
    (`parent.dense_of`).
    `only`: the controls wanted beside the dense parent (None: all).
    Where no layer has a representative gate (Read-ME's cut has none) the paper's gate is left out. A control's
    agreement with the oracle is that on the hidden states its own routing leads to; a control that takes a fixed
    number of experts is compared with an oracle that takes as many.
    """
    if isinstance(parent, Score):
        dense = parent
    elif parent is None:
        assert model.is_partition, "not its own parent"
        dense = score_rows(model, rows, None, progress, AllPolicy(), DENSE)
    else:
        dense = score_rows(parent, rows, None, progress, name=DENSE)
    table = {DENSE: _figures(dense, dense, num_bytes) | {"active_share": 1.0}}
    if only is None or STATIC in only:
        with static_mask(model):
            static = score_rows(model, rows, progress=progress, name=STATIC)
        table[STATIC] = _figures(static, dense, num_bytes) | {"active_share": nominal_share(model)}
    for name, policy in _policies(model, seed).items():
        if only is not None and name not in only:
            continue
        # Policies that always take the same number are held to an oracle that does.
        meter = AgreementMeter(fixed_number=name in FIXED)
        score = score_rows(model, rows, meter, progress, policy, name)
        agreement = meter.tallies.get("path_vs_oracle" if policy is None else "control_vs_oracle")
        table[name] = _figures(score, dense, num_bytes) | {"active_share": round(meter.active_share, 4)}
        table[name] |= agreement.figures() if agreement else {}
    return table


def num_controls(model: RoutedForCausalLM) -> int:
    """How many runs `control_rows` makes: one a row, the dense parent's among them."""
    return 2 + len(_policies(model, seed=0))


def _policies(model: RoutedForCausalLM, seed: int) -> dict[str, RoutingPolicy | None]:
    """Who routes in each control; None: the path router of an exact checkpoint."""
    policies: dict[str, RoutingPolicy | None] = {
        RANDOM: RandomPolicy(seed),
        PAPER: GatePolicy("paper_gate"),
        LINEAR: GatePolicy("linear_gate"),
    }
    if not any(mlp.paper_gate is not None and mlp.paper_gate.weight.any() for mlp in model.routed_mlps):
        del policies[PAPER]
    if model.read_network is not None:
        policies[READ] = GatePolicy()
    if model.config.routing == "path":
        policies[PATH] = None
    policies[ORACLE] = OraclePolicy()
    if model.config.selection == "threshold":
        policies[ORACLE_FIXED] = OraclePolicy(fixed_number=True)
    return policies


def _figures(score: Score, dense: Score, num_bytes: int) -> dict[str, float]:
    return {
        "perplexity": round(score.perplexity, 4),
        "ratio_to_dense": round(score.perplexity / dense.perplexity, 4),
        "bits_per_byte": round(score.bits_per_byte(num_bytes), 4),
    }


def nominal_share(model: RoutedForCausalLM) -> float:
    """Share of the FFNs' neurons that a token runs by the cut, where each takes `num_active` experts."""
    active = sum((cut.num_shared + cut.num_active) * cut.expert_width for cut in model.config.cuts)
    return round(active / sum(mlp.parent_width for mlp in model.routed_mlps), 4)
