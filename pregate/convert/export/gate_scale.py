"""How far to shrink a gate so that a softmax over it gives every chosen expert the same weight.

A stock class weighs its k experts by softmax, normalised over them; ours by 1. With scores near 0 the weights are
near 1/k, and down-projections k times as large do the rest (the notes on CMoE, section 5.4). Scores too near 0
are lost in the rounding of the softmax, and other experts are chosen; so the factor is measured, layer by layer: that
of the least sum of both errors, how far a weight is from 1 and how often an expert is another one.

A softmax does not see what all experts' scores have in common, so the mean row is taken from the gate: what is left
is smaller, and keeps more of its digits in a half type.

Shape letters: T tokens, D hidden width, R routed experts, K experts of a token, C candidates.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from pregate.convert.measure.scoring import routed_by
from pregate.convert.progress import QUIET, Progress
from pregate.model.gates import Choice, LinearGate
from pregate.model.layers import RoutedMLP, RoutingPolicy
from pregate.model.modeling import RoutedForCausalLM

#: Candidates: powers of two (they change no digit) that bring the largest weight to 1/2 .. 1 and below, down to this.
NUM_CANDIDATES = 25
#: The share of tokens with other experts up to which it goes with 1 / factor.
RARE = 0.05


@dataclass(frozen=True)
class GateScale:
    """One layer's factor, and what it does.

    `weight_error`: how far a chosen expert's weight is from 1, in the mean. `other_experts`: the share of the tokens
    measured on that got other experts than the gate chooses; `expected_other_experts`: that of tokens to come.
    """

    factor: float
    weight_error: float
    other_experts: float
    expected_other_experts: float


def centred(gate_RD: torch.Tensor) -> torch.Tensor:
    """The gate less its mean row, float32: the same order of scores."""
    wide_RD = gate_RD.double()
    return (wide_RD - wide_RD.mean(dim=0)).float()


def candidate_factors(gate_RD: torch.Tensor, scale: float | None) -> list[float]:
    """Factors to try on a centred gate; with `scale`, only the one that makes its largest weight that."""
    largest = gate_RD.abs().max().item()
    if largest == 0:
        return [1.0]
    if scale is not None:
        return [scale / largest]
    first = -math.ceil(math.log2(largest))
    return [2.0 ** (first - step) for step in range(NUM_CANDIDATES)]


def stock_weights(x_TD: torch.Tensor, gate_RD: torch.Tensor, num_active: int) -> torch.Tensor:
    """Expert weights [T, R] as Qwen2-MoE's router computes them in the type of `gate_RD`, 0 where not chosen."""
    shares_TR = F.linear(x_TD.to(gate_RD.dtype), gate_RD).softmax(dim=-1, dtype=torch.float32)
    shares_TK, ids_TK = shares_TR.topk(num_active, dim=-1)
    weights_TK = (shares_TK / shares_TK.sum(dim=-1, keepdim=True)).to(gate_RD.dtype).float()
    return torch.zeros_like(shares_TR).scatter(-1, ids_TK, weights_TK)


class ScaleMeter(RoutingPolicy):
    """The gate decides, and every candidate factor is tried beside it, in `dtype`.

    `factors` [C] and shrunken gates by layer, and the sums of both errors [2, C] over the `num_tokens` of each.
    """

    def __init__(self, dtype: torch.dtype, scale: float | None = None) -> None:
        self._dtype, self._scale = dtype, scale
        self._factors: dict[int, list[float]] = {}
        self._gates: dict[int, list[torch.Tensor]] = {}
        self._sums: dict[int, torch.Tensor] = {}
        self._num_tokens: Counter[int] = Counter()

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        gate, layer, k = mlp.gate, mlp.layer, mlp.cut.num_active
        assert isinstance(gate, LinearGate)
        if layer not in self._sums:
            gate_RD = centred(gate.weight)
            factors = self._factors[layer] = candidate_factors(gate_RD, self._scale)
            self._gates[layer] = [(gate_RD * factor).to(self._dtype) for factor in factors]
            self._sums[layer] = torch.zeros(2, len(factors), dtype=torch.float64)
        choice = gate.choose(x_TD)
        wanted_TR = torch.zeros(len(x_TD), mlp.cut.num_routed, device=x_TD.device).scatter(-1, choice.ids, 1.0)
        for column, candidate in enumerate(self._gates[layer]):
            got_TR = k * stock_weights(x_TD, candidate, k)
            same_T = ((got_TR > 0) == (wanted_TR > 0)).all(dim=-1)
            self._sums[layer][0, column] += ((got_TR - wanted_TR).abs().sum(dim=-1) * same_T).sum().item() / k
            self._sums[layer][1, column] += (~same_T).sum().item()
        self._num_tokens[layer] += len(x_TD)
        return choice

    def scales(self) -> list[GateScale]:
        """The best factor of every layer, in order."""
        found = []
        for layer in sorted(self._sums):
            error_C, others_C = self._sums[layer] / self._num_tokens[layer]
            factor_C = torch.tensor(self._factors[layer], dtype=torch.float64)
            # Half types lose so many ties at any factor that counting tells.
            expected_C = expected_others(factor_C, others_C) if self._dtype == torch.float32 else others_C
            best = int((error_C + expected_C).argmin())
            found.append(GateScale(*(column[best].item() for column in (factor_C, error_C, others_C, expected_C))))
        return found


def expected_others(factor_C: torch.Tensor, others_C: torch.Tensor) -> torch.Tensor:
    """The share of tokens that will get other experts, by factor, from the shares counted; largest factor first.

    The float32 softmax loses a fixed step of the shrunken scores, so ties within step / factor are lost, and their
    share goes with 1 / factor. One law for all factors, fitted where few tokens are concerned, tells more than the
    handful of tokens counted at a single one.

    Example: factors 1, 1/2, 1/4 and shares 0, 0.01, 0.02 give the rate 0.03 / 7, so 0.0043, 0.0086, 0.0171.
    """
    rare_C = others_C <= RARE
    if not rare_C.any():
        return others_C
    floor = others_C[rare_C][0]
    rate = (others_C[rare_C] - floor).clamp(min=0).sum() / (1 / factor_C[rare_C]).sum()
    return floor + rate / factor_C


@torch.no_grad()
def measure_scales(
    model: RoutedForCausalLM,
    rows: list[list[int]],
    max_tokens: int,
    dtype: torch.dtype,
    scale: float | None,
    progress: Progress = QUIET,
) -> list[GateScale]:
    """Run a routed `model` over `rows` until `max_tokens`, and find each layer's factor for an export as `dtype`."""
    meter, left = ScaleMeter(dtype, scale), min(max_tokens, sum(map(len, rows)))
    with routed_by(model, meter), progress.stage("measuring gates", left) as advance:
        for row in rows:
            run = row[:left]
            model(torch.tensor([run], device=model.device), use_cache=False)
            advance(len(run))
            left -= len(run)
            if left < 1:
                break
    return meter.scales()
