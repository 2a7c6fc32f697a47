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
_LENGTH_BOUND_ROPE = {"dynamic", "longrope"}
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
        self._device = torch.device(backbone.device)
        #: By sequences and blocks; None for what could not be captured.
        self._captured: dict[tuple[int, int], _Captured | None] = {}
        self._pool: Any = None

    @torch.inference_mode()
    def run(
        self, slices: Sequence[SequenceSlice], ids: np.ndarray, positions: np.ndarray, paths: Paths
    ) -> torch.Tensor | None:
        """Return logits [B, V], which hold until the next step, of one token of each sequence, the exchange's step
        opened; None where such steps cannot be captured and nothing was done."""
        step = dict(zip(("slots", "blocks"), decode_places(slices, self._kv.block_size), strict=True))
        arrays = {"ids": ids, "positions": positions, "lengths": positions + 1, "path_ids": paths.ids}
        if paths.weights is not None:
            arrays["path_weights"] = paths.weights
        step |= {name: torch.from_numpy(array) for name, array in arrays.items()}
        size = _bucket(len(ids)), _bucket(step["blocks"].shape[1])
        step = _to_bucket(step, *size)
        if size not in self._captured:
            self._captured[size] = self._try_capture(step)
        found = self._captured[size]
        if found is None:
            return None
        self._exchange.open_step(len(ids), paths)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # idle, unless a step failed with copies on their way
        for name, part in step.items():
            found.held[name].copy_(found.staged[name].copy_(part), non_blocking=True)
        found.graph.replay()
        return found.logits_BV[: len(ids)]

    def _try_capture(self, step: Inputs) -> _Captured | None:
        """As `_capture`; None, and the log says why, where memory or a library does not allow it."""
        size = f"decode steps of {len(step['ids'])} sequences and {step['blocks'].shape[1]} blocks of context"
        try:
            captured = self._capture(step)
        except RuntimeError as error:
            _log.warning("%s are not captured: %s", size, error)
            return None
        _log.info("%s are captured", size)
        return captured

    def _capture(self, example: Inputs) -> _Captured:
        on_cuda = self._device.type == "cuda"
        staged = {name: part.pin_memory() if on_cuda else part for name, part in example.items()}
        held = {name: part.to(self._device, copy=True) for name, part in staged.items()}
        wanted_B = torch.arange(len(held["ids"]), device=self._device)

        def step() -> torch.Tensor:
            layout = StepLayout.of_decodes(self._kv, held["slots"], held["lengths"], held["blocks"])
            self._exchange.route(held["path_ids"], held.get("path_weights"))
            return self._backbone.run(held["ids"], held["positions"], layout, wanted_B)

        graph, logits_BV = capture(step, self._device, self._pool)
        self._pool = self._pool or graph.pool()
        return _Captured(staged, held, graph, logits_BV)


def decode_graphs(backbone: Backbone, kv: PagedKV) -> DecodeGraphs | None:
    """The graphs of an engine on `backbone`; None, and the log says why, where its steps cannot be captured."""
    if torch.device(backbone.device).type != "cuda":
        return None
    exchange = backbone.exchange
    bound = rope_types(getattr(backbone.config.text_config, "rope_parameters", None)) & _LENGTH_BOUND_ROPE
    if backbone.config.routing != "path":
        hindrance = "gates choose layer by layer"
    elif not isinstance(exchange, LocalExchange) or not exchange.resident:
        hindrance = "not all experts are held in this process"
    elif not backbone.lean or bound:
        hindrance = f"rope_type {', '.join(bound)}" if backbone.lean else "the model runs in transformers' modules"
    else:
        return DecodeGraphs(backbone, exchange, kv)
    _log.info("decode steps are not captured: %s", hindrance)
    return None


def rope_types(parameters: dict[str, Any] | None) -> set[str]:
    """The kinds of rotary tables in a config's `rope_parameters`: one, or one for each type of layer."""
    parameters = parameters or {}
    each = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return {part["rope_type"] for part in each if "rope_type" in part}


def capture(step: Callable[[], torch.Tensor], device: torch.device, pool: Any) -> tuple[Graph, torch.Tensor]:
    """Record what `step` launches on `device`; return the graph and what `step` returned, which a replay fills anew."""
    with torch.cuda.device(device):
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


def _to_bucket(step: Inputs, num_sequences: int, num_blocks: int) -> Inputs:
    """`step` with its first sequence repeated and its tables filled with block 0, which nobody looks at."""
    rows = [n if n < len(step["ids"]) else 0 for n in range(num_sequences)]
    padded = {name: part[rows] for name, part in step.items()}
    return padded | {"blocks": F.pad(padded["blocks"], (0, num_blocks - padded["blocks"].shape[1]))}
