"""What replaces a dense FFN: shared expert, gates, routed experts; and who chooses the experts of a token.

Shape letters: T tokens, D hidden width, M expert width, R routed experts, K active experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import nn

from pregate.kernels import reference
from pregate.model.config import LayerCut, RoutedConfig
from pregate.model.gates import Choice, Gate, LinearGate, RepresentativeGate
from pregate.model.read_gate import ReadGate

#: What stays float32 whatever the weights are stored in: small, and it decides who runs.
FLOAT32_PARTS = ("path_router", "linear_gate", "paper_gate", "read_network", "neuron_score", "mass_threshold")
#: The part of a layer that is the gate of each name; the names of parts are those of stored tensors. With
#: "read" that is so before the layer that is read.
GATE_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "linear": "linear_gate",
        "read": "linear_gate",
        "representative": "paper_gate",
        "representative-signed": "paper_gate",
    }
)


def kept_float32(name: str) -> bool:
    """Whether the tensor of this full name is one of `FLOAT32_PARTS`."""
    return not set(FLOAT32_PARTS).isdisjoint(name.split("."))


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

    `mass_threshold` is to contribution mass what a gate's threshold is to its scores: for the oracle, not for routing.
    Two gates are kept, `linear_gate` and CMoE's `paper_gate`, so that each can be compared with the other on the same
    cut; `gate` is the one that routes, `read_gate` where there is one. Per row, shared rows first, then expert by
    expert: `neuron_index` int32 [(S + R) * M], the parent's neuron; `neuron_score` float32, its mean contribution on
    the calibration text. Experts may overlap (Read-ME's do): then rows repeat a neuron, and others of the parent's
    `parent_width` may have none.
    """

    neuron_index: torch.Tensor
    neuron_score: torch.Tensor
    mass_threshold: torch.Tensor

    def __init__(self, layer: int, hidden_size: int, cut: LayerCut, config: RoutedConfig, hold_experts: bool) -> None:
        super().__init__()
        self.layer, self.cut, self.hidden_size = layer, cut, hidden_size
        self.gate_kind, self.selection, self.token_power = config.gate, config.selection, config.token_power
        self.act_name = act = config.hidden_act
        self.act = reference.activation(act)
        self.shared = SharedExpert(hidden_size, cut.shared_width, act) if cut.num_shared else None
        routed = cut.num_routed > 0
        signed = config.gate == "representative-signed"
        self.linear_gate = LinearGate(hidden_size, cut, config.selection) if routed else None
        self.paper_gate = RepresentativeGate(hidden_size, cut, act, signed) if routed else None
        self.read_gate: ReadGate | None = None
        self.experts = RoutedExperts(hidden_size, cut) if routed and hold_experts else None
        rows = cut.shared_width + cut.num_routed * cut.expert_width
        self.register_buffer("neuron_index", torch.zeros(rows, dtype=torch.int32))
        self.register_buffer("neuron_score", torch.zeros(rows))
        self.register_buffer("mass_threshold", torch.zeros(()))
        self.parent_width = rows
        self.policy: RoutingPolicy = GatePolicy()
        self.fast: FastPath | None = None

    @property
    def gate(self) -> Gate | ReadGate:
        """The gate that routes; only a layer with routed experts has one."""
        gate: Gate | ReadGate | None = self.read_gate or getattr(self, GATE_PARTS[self.gate_kind])
        assert gate is not None
        return gate

    @property
    def routed_neurons(self) -> torch.Tensor:
        """The parent neurons of each routed expert [R, M], a view."""
        return self.neuron_index[self.cut.shared_width :].view(self.cut.num_routed, self.cut.expert_width)

    @property
    def is_partition(self) -> bool:
        """Whether every neuron of the parent has exactly one row, so that all experts together are the parent's FFN."""
        return len(self.neuron_index) == self.parent_width == len(self.neuron_index.unique())

    def dense_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows as one FFN, in row order: `gate_up` [2I, D] and `down` [D, I]; needs the experts here.

        The parent's FFN again where the cut `is_partition`.
        """
        shared = [(*self.shared.gate_up_proj.chunk(2), self.shared.down_proj)] if self.shared is not None else []
        routed = self.experts
        pairs = [] if routed is None else zip(routed.gate_up_proj, routed.down_proj, strict=True)
        parts = shared + [(*gate_up.chunk(2), down) for gate_up, down in pairs]
        gates, ups, downs = zip(*parts, strict=True)
        return torch.cat([*gates, *ups]), torch.cat(downs, dim=1)

    def shared_output(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The shared expert's output [T, D], the first addend of every token."""
        return torch.zeros_like(x_TD) if self.shared is None else self.shared(x_TD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TD = x.reshape(-1, self.hidden_size)
        if self.fast is not None:
            return self.fast.forward(self, x_TD).view_as(x)
        out_TD = self.shared_output(x_TD)
        if self.experts is not None:  # with no expert active too: a policy may take others, and counts what runs
            ids_TK, weights_TK = self.policy.choose(self, x_TD)
            out_TD = reference.add_routed(
                out_TD, x_TD, ids_TK, weights_TK, self.experts.gate_up_proj, self.experts.down_proj, self.act
            )
        return out_TD.view_as(x)


def find_routed_mlps(model: nn.Module) -> dict[str, RoutedMLP]:
    """Every `RoutedMLP` of `model` in layer order, by its name there (for `set_submodule`)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedMLP)}


class FastPath(Protocol):
    """Computes a layer in place of the reference, where `experts_implementation=` asks for it."""

    def forward(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> torch.Tensor:
        """Return [T, D]: what `mlp` computes of `x_TD`."""
        ...


class RoutingPolicy(Protocol):
    """Chooses each token's routed experts in one layer of the reference model."""

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        """Return the experts of each row of `x_TD`."""
        ...


class GatePolicy:
    """The layer's own gate decides (layerwise routing); or "linear_gate" or "paper_gate", whichever is in use."""

    def __init__(self, gate: str = "gate") -> None:
        self._gate = gate

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        return getattr(mlp, self._gate).choose(x_TD)


class PathPolicy:
    """Paths fixed before the layers run decide; one instance lives for one forward pass."""

    def __init__(self, ids_TLK: torch.Tensor, weights_TLK: torch.Tensor | None = None) -> None:
        self.ids_TLK = ids_TLK
        self.weights_TLK = weights_TLK

    @classmethod
    def of(cls, paths: Choice) -> PathPolicy:
        """From ids and weights [B, N, L, K] of a batch, padding and all."""
        return cls(paths.ids.flatten(0, 1), None if paths.weights is None else paths.weights.flatten(0, 1))

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        weights = None if self.weights_TLK is None else self.weights_TLK[:, mlp.layer]
        return Choice(self.ids_TLK[:, mlp.layer], weights)


def contribution_mass(mlp: RoutedMLP, x_TD: torch.Tensor) -> torch.Tensor:
    """Return [T, R]: each routed expert's sum over its neurons of |h_i| times the norm of down column i.

    (The notes on CMoE, section 5.3.) See `weighted_mass` for what is made of it.
    """
    experts = mlp.experts
    assert experts is not None
    masses = []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        h_TM = reference.gated_hidden(x_TD, gate_up, mlp.act)
        masses.append(h_TM.abs() @ down.norm(dim=0))
    return torch.stack(masses, dim=-1)


def weighted_mass(mlp: RoutedMLP, x_TD: torch.Tensor) -> torch.Tensor:
    """Contribution mass [T, R] divided by a power (`token_power`) of its sum over the token's experts.

    This is what an oracle chooses experts by and what the linear gate and the path router are fitted to. Within a
    token nothing changes its place; between tokens, which counts where a threshold chooses, power 0 takes masses as
    they are, so that tokens of small activations get few experts, and 1 takes shares alone.
    """
    mass_TR = contribution_mass(mlp, x_TD)
    return by_token_power(mass_TR, mass_TR.sum(dim=-1, keepdim=True), mlp.token_power)


def by_token_power(mass_TR: torch.Tensor, total_T1: torch.Tensor, power: float) -> torch.Tensor:
    """Divide each token's masses by `total_T1` to the `power`; a token without any keeps its zeros."""
    return mass_TR if power == 0 else mass_TR / total_T1.clamp_min(1e-20).pow(power)
