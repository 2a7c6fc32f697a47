"""`LocalLayers`: whole layers, shared and routed, of a host in the engine's own process. No groups, no rows sent.

Shape letters: T tokens, L layers, K experts per token, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from pregate.kernels.contract import ExpertFFN
from pregate.kernels.expert_ffn import layer_segments
from pregate.kernels.segments import Segment
from pregate.kernels.tools.warm_up import warm_up_layer
from pregate.kernels.units import LayerUnits, SharedFFN
from pregate.kernels.weights import split_shared
from pregate.model.config import LayerCut
from pregate.workers.host.store import UnitStore


class LocalLayers:
    """Runs layer after layer of a step whose paths are known. `begin` makes all layers' segments, on the device where
    there is one; from there to the last layer nothing waits for the device:

    - ids travel once, in a pinned copy, and all else about them is computed there (`ExpertFFN.segments`);
    - units have no gaps, so nobody looks at the counts (`LayerUnits.check` would copy offsets to the host);
    - what would wait and is not done: `.item()`, `.tolist()`, `.cpu()`, `.numpy()` or the truth of a device tensor, a
      copy from memory that is not pinned, an index by a mask (`nonzero`).

    The sum is that of `Exchange.combine`: the shared expert, then a token's experts in ascending id.
    `count` is told rows and pairs of every layer run.
    """

    def __init__(
        self, ffn: ExpertFFN, store: UnitStore, cuts: Sequence[LayerCut], count: Callable[[int, int], None]
    ) -> None:
        self._ffn, self._store, self._cuts, self._count = ffn, store, cuts, count
        self._sizes = {n: (cut.num_routed, cut.num_shared) for n, cut in enumerate(cuts) if cut.num_routed}
        self._shared: dict[int, SharedFFN] = {}
        self._units: dict[int, tuple[int, LayerUnits]] = {}
        self._segments: dict[int, Segment] = {}
        self._num_pairs_L = [0] * len(cuts)

    @property
    def takes_shared(self) -> bool:
        """True where a layer's shared expert is wanted as units in the layer's own stack."""
        return self._ffn.shared_in_segments

    def take_shared(self, layer: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Hold a layer's shared expert, stored as one FFN `gate_up` [2 S M, D] and `down` [D, S M], as S units."""
        self._store.hold_shared(layer, split_shared(gate_up, down, self._cuts[layer].num_shared))

    def join_shared(self, layer: int, shared: SharedFFN) -> None:
        """Let `shared` run a layer's shared expert, whose output the experts are added to."""
        self._shared[layer] = shared

    def warm_up(self, x_1D: torch.Tensor, step_tokens: int, *, weighted: bool = False) -> int:
        """Compile the kernels of steps of up to `step_tokens` tokens like `x_1D`; return the number of calls made.

        `weighted`: steps come with weights of experts.
        """
        cuts = {cut: layer for layer, cut in enumerate(self._cuts) if cut.num_active}
        if not self._ffn.compiles:
            return 0
        return sum(
            warm_up_layer(self._ffn, self._units_of(layer), cut.num_shared, x_1D, step_tokens, weighted=weighted)
            for cut, layer in cuts.items()
        )

    def begin(self, ids_TLK: np.ndarray, weights_TLK: np.ndarray | None = None) -> None:
        """Open a step with path ids int16 [T, L, K], -1 padding, and what the experts weigh (None: 1)."""
        self._num_pairs_L = (ids_TLK >= 0).sum(axis=(0, 2)).tolist()
        weights = None if weights_TLK is None else torch.from_numpy(weights_TLK)
        self._segments = layer_segments(self._ffn, self._sizes, torch.from_numpy(ids_TLK), weights)

    def run(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """Return [T, D]: the shared expert and each token's experts of `layer`, summed."""
        self._count(x_TD.shape[0], self._num_pairs_L[layer])
        return self._ffn.layer(x_TD, self._segments[layer], self._units_of(layer))

    def _units_of(self, layer: int) -> LayerUnits:
        version = int(self._store.versions[layer])
        found = self._units.get(layer)
        if found is None or found[0] != version:
            units = LayerUnits(self._store.weights(layer), self._store.unit_slots(layer), self._shared.get(layer))
            self._units[layer] = found = version, units
        return found[1]
