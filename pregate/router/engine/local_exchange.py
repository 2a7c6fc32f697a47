"""`LocalExchange`: the base case, whole layers of a host in the engine's own process. No groups, no rows sent.

Shape letters: T tokens, L layers, K experts per token, D hidden width.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import torch

from pregate.base.log import get_logger
from pregate.kernels.expert_ffn import layer_segments
from pregate.kernels.tools.warm_up import warm_up_layer
from pregate.model.gates import Choice
from pregate.model.paths import Paths
from pregate.router.engine.exchange import Receipt
from pregate.router.engine.lookahead import rest_of_step, used_units
from pregate.router.engine.shared_experts import SharedExperts
from pregate.workers.client.host_client import HostClient, LocalUnits
from pregate.workers.link.protocol import Expected

_log = get_logger(__name__)


class LocalExchange:
    """Runs layer after layer of a step; see `Exchange`. `begin_step` makes all layers' segments where paths decide, on
    the device where there is one; from there to the last layer nothing waits for the device:

    - ids travel once, in a pinned copy, and all else about them is computed there (`ExpertFFN.segments`);
    - units have no gaps, so nobody looks at the counts (`LayerUnits.check` would copy offsets to the host);
    - what would wait and is not done: `.item()`, `.tolist()`, `.cpu()`, `.numpy()` or the truth of a device tensor, a
      copy from memory that is not pinned, an index by a mask (`nonzero`).

    A layer whose units are not all held waits until they are read, and on a device for the ids that say which.
    """

    def __init__(self, engine: str, client: HostClient, local: LocalUnits, shared: SharedExperts) -> None:
        self.engine, self.clients, self.shared = engine, [client], shared
        self.traces = ""  # there is nobody to tell
        self.lost: dict[int, str] = {}
        self.lost_at_s: dict[int, float] = {}
        self.rows_LR = np.zeros((0, 0), dtype=np.int64)
        self._local, self._ffn, self._cuts = local, local.ffn, shared.config.cuts
        self._sizes = {n: (cut.num_routed, cut.num_shared) for n, cut in enumerate(self._cuts) if cut.num_active}
        self._segments: dict[int, Any] = {}
        self._paths: Paths | None = None
        self._num_tokens, self._number = 0, -1
        #: What gates chose in the layers run so far.
        self._chosen_TK: list[torch.Tensor] = []

    @property
    def placement(self) -> list[list[int]]:
        return [[0] * cut.num_routed for cut in self._cuts]

    def hold_shared(self, layer: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        if self._ffn.shared_in_segments and layer in self._sizes:
            self._local.hold_shared(layer, gate_up, down)
        else:
            self.shared.hold(layer, gate_up, down)

    def replace(self, host: int, client: HostClient) -> None:
        raise AssertionError("a host in the engine's own process lives as long as the engine")

    def place(self, copies_LRC: np.ndarray, num_hosts: int) -> None:
        raise AssertionError("a host in the engine's own process holds all units")

    @torch.inference_mode()
    def warm_up(self, step_tokens: int) -> None:
        self.shared.warm_up(step_tokens)
        if not self._ffn.compiles:
            return
        started_s, config, x_1D = time.perf_counter(), self.shared.config, self.shared.row()
        if config.routing == "path":
            weighted = [config.router_shape.weights == "learned"]
        else:
            weighted = [False] if config.gate in ("linear", "read") else [False, True]
        for layer, with_weights in product({self._cuts[layer]: layer for layer in self._sizes}.values(), weighted):
            units = self._local.units(layer, self.shared.of(layer))
            warm_up_layer(self._ffn, units, self._cuts[layer].num_shared, x_1D, step_tokens, weighted=with_weights)
        _log.info("kernels of whole layers compiled in %.1f s", time.perf_counter() - started_s)

    @property
    def resident(self) -> bool:
        """Whether every layer can run at any time: nothing is read and nobody waits."""
        return self._local.complete

    @property
    def wants_lookahead(self) -> bool:
        return self._local.looks_ahead

    def expect(self, expected: Expected) -> None:
        self._local.expect(self.engine, expected)

    def foretell(self, ids: Mapping[int, np.ndarray]) -> None:
        self.expect(rest_of_step(self._number, ids, self._cuts))

    def held_LR(self) -> np.ndarray | None:  # noqa: N802
        return self.clients[0].held_LR

    def begin_step(self, number: int, num_tokens: int, paths: Paths | None) -> None:
        self.open_step(num_tokens, paths)
        self._number = number
        if paths is not None and self.wants_lookahead:
            self._local.plan(self.engine, number, used_units(paths.ids, max(cut.num_routed for cut in self._cuts)))
        if paths is not None:
            self.route(torch.from_numpy(paths.ids), None if paths.weights is None else torch.from_numpy(paths.weights))

    def open_step(self, num_tokens: int, paths: Paths | None) -> None:
        """Note what `end_step` counts. It is all that a step needs whose layers are a captured graph's."""
        self._num_tokens, self._paths, self._chosen_TK, self._segments = num_tokens, paths, [], {}

    def route(self, ids_TLK: torch.Tensor, weights_TLK: torch.Tensor | None) -> None:
        """Make all layers' segments of paths that are on the host or the device already."""
        self._segments = layer_segments(self._ffn, self._sizes, ids_TLK, weights_TLK)

    def dispatch(self, layer: int, x_TD: torch.Tensor, choice: Choice | None = None) -> Receipt:
        """As the protocol says; nothing is away after it."""
        if layer not in self._sizes:
            return Receipt(layer, self.shared.run(layer, x_TD))
        if choice is not None:
            self._chosen_TK.append(choice.ids)
        if choice is not None:
            weights_T1K = None if choice.weights is None else choice.weights[:, None]
            segment = self._ffn.segments(choice.ids[:, None], *self._sizes[layer], weights_T1K).layer(0)
        else:
            segment = self._segments[layer]
        if not self._local.complete:
            if choice is not None:
                ids = choice.ids.cpu().numpy()
            else:
                assert self._paths is not None
                ids = self._paths.ids[:, layer]
            used = np.unique(ids)
            self._local.read(self.engine, self._number, layer, used[used >= 0])
        out_TD = self._ffn.layer(x_TD, segment, self._local.units(layer, self.shared.of(layer)))
        if not self._local.complete:
            self._local.release()
        return Receipt(layer, out_TD)

    def combine(self, receipt: Receipt) -> torch.Tensor:
        return receipt.out_TD

    def end_step(self) -> np.ndarray:
        """As the protocol says. Waits for the device where gates decided."""
        if self._paths is not None:
            counts_TL = (self._paths.ids >= 0).sum(axis=2)
        else:
            none_T = torch.zeros(self._num_tokens, 0, dtype=torch.bool)
            counts = [(ids_TK >= 0).sum(dim=1) for ids_TK in self._chosen_TK]
            counts_TL = (torch.stack(counts, dim=1) if counts else none_T).cpu().numpy()
        self._local.count(len(self._sizes), self._num_tokens, int(counts_TL.sum()))
        return counts_TL.sum(axis=1, dtype=np.int64)[:, None]

    def poll(self) -> None:
        pass
