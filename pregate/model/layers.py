"""What replaces a dense FFN: shared expert, gate, routed experts; and who chooses the experts of a token.

Shape letters: T tokens, D hidden width, M expert width, R routed experts, K active experts.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from pregate.kernels import reference
from pregate.model.config import LayerCut


class Gate(nn.Module):
    """Scores [T, R] of a layer's routed experts from its FFN input.

    `linear`: closed-form ridge regression onto each expert's contribution mass (reference: D2DMoE-like router,
    fitted without gradient steps). `representative`: CMoE, section 3.3: |act(x.g) * (x.u)| of one L2-normalised
    neuron per expert.
    """

    def __init__(self, kind: str, hidden_size: int, num_routed: int, act: str) -> None:
        super().__init__()
        self.kind = kind
        self.act = reference.activation(act)
        rows = num_routed if kind == "linear" else 2 * num_routed
        self.weight = nn.Parameter(torch.zeros(rows, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_routed)) if kind == "linear" else None

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self.bias is not None:
            return F.linear(x_TD, self.weight, self.bias)
        return reference.gated_hidden(x_TD, self.weight, self.act).abs()


class SharedExpert(nn.Module):
    """The always-active neurons of one layer, stored as one FFN."""

    def __init__(self, hidden_size: int, width: int, act: str) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.zeros(hidden_size, width))
        self.act = reference.activation(act)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return reference.expert_ffn(x_TD, self.gate_up_proj, self.down_proj, self.act)


class RoutedExperts(nn.Module):
    """Weights of a layer's routed experts, in the layout of transformers' own experts modules."""

    def __init__(self, hidden_size: int, cut: LayerCut) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(cut.num_routed, 2 * cut.expert_width, hidden_size))
        self.down_proj = nn.Parameter(torch.zeros(cut.num_routed, hidden_size, cut.expert_width))


class RoutedMLP(nn.Module):
    """One layer's FFN after the cut. `experts` is None where the routed experts live elsewhere (a backbone).

    `neuron_index` int32 [(S + R) * M]: the parent neuron of every row, shared rows first, then expert by expert.
    """

    neuron_index: torch.Tensor

    def __init__(self, layer: int, hidden_size: int, act: str, cut: LayerCut, gate: str, hold_experts: bool) -> None:
        super().__init__()
        self.layer, self.cut, self.hidden_size = layer, cut, hidden_size
        self.act = reference.activation(act)
        self.shared = SharedExpert(hidden_size, cut.shared_width, act) if cut.num_shared else None
        routed = cut.num_routed > 0
        self.gate = Gate(gate, hidden_size, cut.num_routed, act) if routed else None
        self.experts = RoutedExperts(hidden_size, cut) if routed and hold_experts else None
        rows = cut.shared_width + cut.num_routed * cut.expert_width
        self.register_buffer("neuron_index", torch.zeros(rows, dtype=torch.int32))
        self.policy: RoutingPolicy = GatePolicy()

    def shared_output(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The shared expert's output [T, D], the first addend of every token."""
        return torch.zeros_like(x_TD) if self.shared is None else self.shared(x_TD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TD = x.reshape(-1, self.hidden_size)
        out_TD = self.shared_output(x_TD)
        if self.experts is not None and self.cut.num_active:
            ids_TK, weights_TK = self.policy.choose(self, x_TD)
            out_TD = reference.add_routed(
                out_TD, x_TD, ids_TK, weights_TK, self.experts.gate_up_proj, self.experts.down_proj, self.act
            )
        return out_TD.view_as(x)


class RoutingPolicy(Protocol):
    """Chooses each token's routed experts in one layer of the reference model."""

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return ids int64 [T, K] (ascending, -1 padding last) and weights [T, K] or None (all 1)."""
        ...


class GatePolicy:
    """The layer's own gate decides (layerwise routing)."""

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert mlp.gate is not None
        return reference.top_k(mlp.gate(x_TD), mlp.cut.num_active), None


class PathPolicy:
    """Paths fixed before the layers run decide; one instance lives for one forward pass."""

    def __init__(self, ids_TLK: torch.Tensor, weights_TLK: torch.Tensor | None = None) -> None:
        self.ids_TLK = ids_TLK
        self.weights_TLK = weights_TLK

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        weights = None if self.weights_TLK is None else self.weights_TLK[:, mlp.layer]
        return self.ids_TLK[:, mlp.layer], weights


def contribution_mass(mlp: RoutedMLP, x_TD: torch.Tensor) -> torch.Tensor:
    """Return [T, R]: each routed expert's sum over its neurons of |h_i| times the norm of down column i.

    This is what an oracle ranks experts by and what the linear gate and the path router are fitted to
    (the notes on CMoE, section 5.3).
    """
    experts = mlp.experts
    assert experts is not None
    masses = []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        h_TM = reference.gated_hidden(x_TD, gate_up, mlp.act)
        masses.append(h_TM.abs() @ down.norm(dim=0))
    return torch.stack(masses, dim=-1)
