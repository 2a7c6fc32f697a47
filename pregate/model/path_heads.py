"""The heads of a path router: from a token's state to the outputs of every layer, in one of three shapes.

Shape letters: C router width, L layers that have outputs, O outputs of all layers side by side (scores or code
logits), any leading dimensions (...).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from pregate.base.errors import UserError
from pregate.model.config import LayerCut, PathRouterConfig
from pregate.model.dselect import num_logits


class RecurrentHeads(nn.Module):
    """A gated recurrent cell that runs over the layers, so that a layer's choice can build on those before it.

    (Layerwise Recurrent Router, Qiu et al. 2024, section 3: a GRU shared by all layers with a projection of its own
    for each. There its input is a layer's hidden state; here all layers see the same token, so the projection is one
    for all and what differs is a learned offset per layer.) h_0 = x; h_l = GRU(x W + offset_l, h_{l-1}); layer l's
    outputs are a linear map of h_l of its own.
    """

    def __init__(self, dim: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self._sizes = [n for n in sizes if n]
        self.input = nn.Linear(dim, 3 * dim, bias=False)
        self.offset = nn.Parameter(torch.zeros(len(self._sizes), 3 * dim))
        self.state = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, sum(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs [..., O] of states [..., C]."""
        from_token, h, parts = self.input(x), x, []
        weights = zip(self.output.weight.split(self._sizes), self.output.bias.split(self._sizes), strict=True)
        for offset, (weight, bias) in zip(self.offset, weights, strict=True):
            reset, update, new = (from_token + offset).chunk(3, dim=-1)
            h_reset, h_update, h_new = self.state(h).chunk(3, dim=-1)
            keep = torch.sigmoid(update + h_update)
            h = torch.lerp(torch.tanh(new + torch.sigmoid(reset + h_reset) * h_new), h, keep)
            parts.append(F.linear(h, weight, bias))
        return torch.cat(parts, dim=-1) if parts else x[..., :0]


class SingleHead(nn.Module):
    """One choice for all layers (Read-ME, section 3.2): the same outputs repeated."""

    def __init__(self, dim: int, sizes: Sequence[int]) -> None:
        super().__init__()
        routed = [n for n in sizes if n]
        self._repeats = len(routed)
        self.output = nn.Linear(dim, routed[0] if routed else 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs [..., O] of states [..., C]."""
        return self.output(x).repeat(*[1] * (x.ndim - 1), self._repeats)


def make_heads(config: PathRouterConfig, cuts: Sequence[LayerCut], selection: str) -> nn.Module:
    """The heads that `config` asks for: states [..., C] -> scores [..., S], or code logits with gate "dselect"."""
    check_heads(config, cuts)
    sizes = head_sizes(config, cuts, selection)
    if config.heads == "recurrent":
        return RecurrentHeads(config.dim, sizes)
    if config.heads == "single":
        return SingleHead(config.dim, sizes)
    return nn.Linear(config.dim, sum(sizes))


def head_sizes(config: PathRouterConfig, cuts: Sequence[LayerCut], selection: str) -> list[int]:
    """Outputs of each layer: a score for each expert, or the logits of codes."""
    return [num_logits(c, selection) if config.gate == "dselect" else c.num_routed for c in cuts]


def check_heads(config: PathRouterConfig, cuts: Sequence[LayerCut]) -> None:
    """UserError where one index for all layers is asked for and they have not equally many experts."""
    kinds = sorted({(c.num_active, c.num_routed) for c in cuts if c.num_routed})
    if config.heads == "single" and len(kinds) > 1:
        found = ", ".join(f"{active} of {routed}" for active, routed in kinds)
        raise UserError.of("--heads", "single", f"needs as many experts in every layer, found {found} active")
