"""`DecodeGraphs`: decode steps as CUDA graphs, one per bucket of batch and context. A replay is one launch in place of
hundreds.

Data on its way: ids, positions, slots and lengths [B], blocks [B, N] and the paths' ids [B, L, K] of a step, on the
host -> padded to the bucket in pinned memory -> the graph's own buffers -> replay -> logits [B, V].

Shape letters: B sequences, N blocks of the longest context, L layers, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from pregate.base.log import get_logger
from pregate.model.paths import Paths
from pregate.router.engine.backbone import Backbone
from pregate.router.engine.kv_cache import PagedKV
from pregate.router.engine.local_exchange import LocalExchange
from pregate.router.engine.step_layout import SequenceSlice, StepLayout, decode_places

#: Rotary tables that look at how far the positions reach, which a graph cannot ask.
_LENGTH_BOUND_ROPE = ("dynamic", "longrope")
#: Runs before a capture: libraries make their workspaces in the first.
_WARM_UPS = 2

_log = get_logger(__name__)


class Graph(Protocol):
    """What is needed of a `torch.cuda.CUDAGraph`."""

    def replay(self) -> None: ...
    def pool(self) -> Any: ...


#: What differs between the steps of a bucket, by name: ids, positions, slots and lengths [B], blocks [B, N], path_ids
#: [B, L, K], and path_weights [B, L, K] where they are not all 1.
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Captured:
    """A bucket's step: `staged` on the host, pinned where there is a device, `held` where the graph reads."""

    staged: Inputs
    held: Inputs
    graph: Graph
    logits_BV: torch.Tensor


class DecodeGraphs:
    """Captures and replays the decode steps of a lean `backbone` whose exchange runs whole layers in this process.

    A bucket is captured when the first step falls into it. Padding repeats the first sequence: its rows write to its
    slot once more what they wrote already, and no slot or block has to be kept for them.
    """

    def __init__(self, backbone: Backbone, exchange: LocalExchange, kv: PagedKV) -> None:
        self._backbone, self._exchange, self._kv = backbone, exchange, kv
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool: Any = None

    @torch.inference_mode()
    def run(
        self, slices: Sequence[SequenceSlice], ids: np.ndarray, positions: np.ndarray, paths: Paths
    ) -> torch.Tensor:
        """Return logits [B, V], which hold until the next step, of one token of each sequence; opens the exchange's
        step."""
        self._exchange.count_step(len(ids), paths)
        step = dict(zip(("slots", "blocks"), decode_places(slices, self._kv.block_size), strict=True))
        arrays = {"ids": ids, "positions": positions, "lengths": positions + 1, "path_ids": paths.ids}
        if paths.weights is not None:
            arrays["path_weights"] = paths.weights
        step |= {name: torch.from_numpy(array) for name, array in arrays.items()}
        size = _bucket(len(ids)), _bucket(step["blocks"].shape[1])
        padded = _padded(step, *size)
        if size not in self._captured:
            self._captured[size] = self._capture(padded)
        found = self._captured[size]
        for name, part in padded.items():
            found.held[name].copy_(found.staged[name].copy_(part), non_blocking=True)
        found.graph.replay()
        return found.logits_BV[: len(ids)]

    def _capture(self, padded: Inputs) -> _Captured:
        device = torch.device(self._backbone.device)
        staged = {name: part.pin_memory() if device.type == "cuda" else part for name, part in padded.items()}
        held = {name: part.to(device, copy=True) for name, part in staged.items()}
        num_sequences, num_blocks = held["blocks"].shape
        wanted_B = torch.arange(num_sequences, device=device)
        context = num_blocks * self._kv.block_size

        def step() -> torch.Tensor:
            layout = StepLayout(self._kv, held["slots"], held["lengths"], context, False, None, held["blocks"], ())
            self._exchange.route(held["path_ids"], held.get("path_weights"))
            return self._backbone.run(held["ids"], held["positions"], layout, wanted_B)

        graph, logits_BV = capture(step, self._pool)
        self._pool = self._pool or graph.pool()
        _log.info("captured: decode steps of up to %d sequences and %d tokens of context", num_sequences, context)
        return _Captured(staged, held, graph, logits_BV)


def decode_graphs(backbone: Backbone, kv: PagedKV) -> DecodeGraphs | None:
    """The graphs of an engine on `backbone`; None, and the log says why, where its steps cannot be captured."""
    if torch.device(backbone.device).type != "cuda":
        return None
    exchange = backbone.exchange
    rope = (getattr(backbone.config.text_config, "rope_parameters", None) or {}).get("rope_type")
    if backbone.config.routing != "path":
        hindrance = "gates choose layer by layer"
    elif not isinstance(exchange, LocalExchange) or not exchange.resident:
        hindrance = "not all experts are held in this process"
    elif not backbone.lean or rope in _LENGTH_BOUND_ROPE:
        hindrance = f"rope_type {rope}" if backbone.lean else "the model runs in transformers' modules"
    else:
        return DecodeGraphs(backbone, exchange, kv)
    _log.info("decode steps are not captured: %s", hindrance)
    return None


def capture(step: Callable[[], torch.Tensor], pool: Any) -> tuple[Graph, torch.Tensor]:
    """Record what `step` launches; return the graph and what `step` returned, which a replay fills anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = step()
    return graph, result


def _bucket(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _padded(step: Inputs, num_sequences: int, num_blocks: int) -> Inputs:
    """`step` with its first sequence repeated and its tables filled with block 0, which nobody looks at."""
    rows = [n if n < len(step["ids"]) else 0 for n in range(num_sequences)]
    padded = {name: part[rows] for name, part in step.items()}
    return padded | {"blocks": F.pad(padded["blocks"], (0, num_blocks - padded["blocks"].shape[1]))}
