"""Gate "read": one small network reads the FFN input of a layer and gives at once the scores of the routed experts of
that layer and of all after it. It needs no state: a hidden state knows what came before its token.

Data on its way: x [T, D] of layer K -> RMSNorm -> hidden layer [T, C] with SiLU -> scores [T, S] -> per layer, when its
turn comes, top-k or threshold.

Shape letters: T tokens, D hidden width, C the network's width, S the routed experts of layers K.. side by side, R
routed experts of one layer, L layers from K on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from pregate.model.config import LayerCut, ReadNetworkConfig
from pregate.model.gates import Choice, choice_of, margin_of
from pregate.model.path_router import layer_thresholds, split_layers

if TYPE_CHECKING:
    from pregate.model.layers import RoutedMLP


class ReadNetwork(nn.Module):
    """Scores of the routed experts of all layers from `config.layer` on; `cuts` and `thresholds` [L] are those layers'.

    What it gave last is kept for the gates of the layers after, which run in the same forward pass: see `scores`.
    """

    thresholds: torch.Tensor

    def __init__(self, config: ReadNetworkConfig, hidden_size: int, cuts: Sequence[LayerCut], selection: str) -> None:
        super().__init__()
        self.config, self.cuts, self.selection = config, tuple(cuts[config.layer :]), selection
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.up = nn.Linear(hidden_size, config.dim, bias=False)
        self.down = nn.Linear(config.dim, sum(c.num_routed for c in self.cuts))
        self.register_buffer("thresholds", torch.zeros(len(self.cuts)), persistent=selection == "threshold")
        self._kept: tuple[torch.Tensor, ...] = ()
        #: Whose pass it is of: thread and tokens; and the layer that asked last.
        self._owner, self._asked = (0, 0), -1

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Scores [T, S] in the network's own type."""
        return self.down(F.silu(self.up(self.norm(x_TD.to(self.norm.weight.dtype)))))

    @torch.no_grad()
    def scores(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """Scores [T, R] of `layer` from its own FFN input: computed in the layer that is read, in later ones taken from
        what was computed there. RuntimeError where that was not just before, in this thread, of as many tokens."""
        owner = threading.get_ident(), len(x_TD)
        if layer == self.config.layer:
            self._kept, self._owner = split_layers(self(x_TD), self.cuts), owner
        elif owner != self._owner or layer < self._asked:
            raise RuntimeError(
                f"gate of layer {layer}: layer {self.config.layer} was not read just before of this batch"
            )
        self._asked = layer
        return self._kept[layer - self.config.layer]

    def limit(self, layer: int) -> torch.Tensor | None:
        """The threshold of `layer`; None where a fixed number of experts is chosen."""
        return self.thresholds[layer - self.config.layer] if self.selection == "threshold" else None

    def choose(self, layer: int, scores_TR: torch.Tensor) -> Choice:
        """What scores of `layer` choose."""
        return choice_of(scores_TR, self.cuts[layer - self.config.layer].num_active, self.limit(layer))

    def later(self) -> dict[int, Choice]:
        """What it chooses, for the tokens it ran on last, in each layer with a choice after the one it reads."""
        layers = enumerate(zip(self.cuts, self._kept, strict=True), start=self.config.layer)
        return {n: self.choose(n, x) for n, (cut, x) in layers if cut.num_active and n > self.config.layer}

    @torch.no_grad()
    def put_thresholds(self, scores_TS: torch.Tensor, numbers: Sequence[float]) -> None:
        """Set each layer's threshold so that its experts' mean number per token of `scores_TS` is that of `numbers`."""
        self.thresholds.copy_(layer_thresholds(self.cuts, scores_TS, numbers))

    def hang_in(self, mlps: Iterable[RoutedMLP]) -> None:
        """Let it choose in the layers that it knows."""
        for mlp in mlps:
            if mlp.layer >= self.config.layer and mlp.cut.num_routed:
                mlp.read_gate = ReadGate(self, mlp.layer)


class ReadGate:
    """A layer's part of a `ReadNetwork`, as a gate; no module, so that the network's tensors are the model's once."""

    def __init__(self, network: ReadNetwork, layer: int) -> None:
        self.network, self.layer = network, layer

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Scores [T, R]; see `ReadNetwork.scores`, also for what is raised."""
        return self.network.scores(self.layer, x_TD)

    def ranking(self, x_TD: torch.Tensor) -> torch.Tensor:
        """What the choice goes by [T, R]."""
        return self(x_TD)

    def choose(self, x_TD: torch.Tensor) -> Choice:
        return self.network.choose(self.layer, self(x_TD))

    def margin(self, x_TD: torch.Tensor) -> torch.Tensor:
        """As `LinearGate.margin`."""
        num_active = self.network.cuts[self.layer - self.network.config.layer].num_active
        return margin_of(self(x_TD), num_active, self.network.limit(self.layer))
