"""`WholeLayers`: a step's layers as one wide FFN each, for the steps in which that is faster (`WholeLayer`).

Shape letters: T tokens, L layers, R routed experts, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pregate.kernels.contract import Pair
from pregate.kernels.cpu.whole import WholeLayer, absent, spread
from pregate.model.config import LayerCut
from pregate.model.gates import Choice
from pregate.model.paths import Paths
from pregate.router.engine.shared_experts import SharedExperts
from pregate.workers.client.local import LocalUnits


class WholeLayers:
    """Holds the layers it is given a second time, where they gain from it: all of one cut, experts narrow, on a CPU,
    units all held and nobody has asked for another implementation by name."""

    def __init__(self, shared: SharedExperts, local: LocalUnits) -> None:
        self._act, self._local, self._dtype = shared.config.hidden_act, local, shared.dtype
        self._layers: dict[int, WholeLayer] = {}
        self._num_layers, self._num_routed = len(shared.config.cuts), shared.config.cuts[0].num_routed
        self._max_rows = max_rows(
            shared.config.cuts, shared.hidden_size, shared.device, shared.dtype, local.ffn_is_ours and local.complete
        )
        self._absent_LTR: torch.Tensor | None = None
        self._weights_LTR: torch.Tensor | None = None

    def hold(self, layer: int, shared: Pair) -> None:
        """Take a layer with its shared expert, gate_up [2 S M, D] and down [D, S M]."""
        if self._max_rows > 1:
            self._layers[layer] = WholeLayer(self._act, shared, self._local.stored(layer), self._dtype)

    def pay(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens is faster here."""
        return 1 < num_tokens <= self._max_rows and len(self._layers) == self._num_layers

    def begin_step(self, num_tokens: int, paths: Paths) -> bool:
        """Make what `run` reads of the paths; False for a step that is not run here."""
        if not self.pay(num_tokens):
            return False
        self._absent_LTR, self._weights_LTR = self._masks(paths.ids, paths.weights)
        return True

    def run(self, layer: int, x_TD: torch.Tensor, choice: Choice | None) -> torch.Tensor | None:
        """Return [T, D] of a layer, on what the step's paths or `choice` say; None where it is not run here."""
        if not self.pay(len(x_TD)):
            return None
        if choice is None:
            absent_LTR, weights_LTR, place = self._absent_LTR, self._weights_LTR, layer
        else:
            weights = None if choice.weights is None else choice.weights[:, None].numpy()
            absent_LTR, weights_LTR = self._masks(choice.ids[:, None].numpy(), weights)
            place = 0
        assert absent_LTR is not None
        weights_TR = None if weights_LTR is None else weights_LTR[place]
        return self._layers[layer].run(x_TD, absent_LTR[place], weights_TR)

    def _masks(self, ids_TLK: np.ndarray, weights_TLK: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        weights = None if weights_TLK is None else spread(ids_TLK, weights_TLK, self._num_routed, self._dtype)
        return absent(ids_TLK, self._num_routed), weights


def max_rows(cuts: Sequence[LayerCut], hidden: int, device: torch.device, dtype: torch.dtype, may: bool) -> int:
    """Up to how many rows whole layers pay for a model of these cuts; below 2 it should not hold any.

    `may`: every unit is held in the engine's process and nobody has asked for another implementation by name.
    """
    cut = cuts[0]
    if not may or device.type != "cpu" or not cut.num_active or len(set(cuts)) > 1:
        return 0
    if WholeLayer.why_not(cut.expert_width, hidden, dtype):
        return 0
    return WholeLayer.max_rows(cut.num_shared, cut.num_active, cut.num_routed)
