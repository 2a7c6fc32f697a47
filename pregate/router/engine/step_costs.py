"""What steps cost on this machine and these hosts, measured once at start, through what will serve.

Shape letters: T tokens, L layers, K experts per token, D hidden width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from pregate.model.checkpoint import CheckpointReader
from pregate.model.gates import Choice
from pregate.model.paths import Paths
from pregate.router.engine.backbone import Backbone
from pregate.router.engine.batching import StepCosts, UnitLayout
from pregate.router.engine.kv_cache import PagedKV
from pregate.router.engine.step_layout import SequenceSlice, StepLayout

_ROWS = 16
#: Steps are timed at least so often, and for so long.
_REPEATS, _TIMED_S = 5, 0.1
#: Differences of times below this are noise: what is divided by them must not become 0.
_LEAST_S = 1e-12
#: A host's word of what it holds, which comes with its heartbeats, is waited for so long.
_WORD_S = 3.0


@torch.inference_mode()
def measure(backbone: Backbone, kv: PagedKV, layout: UnitLayout, reader: CheckpointReader, most: int) -> StepCosts:
    """Time steps of one token with one unit a layer, of several on the same, and of as many units of a host as it
    holds; of each host by itself. Where that is no more than one unit a layer, its share of the way there counts as the
    unit's; where it is less, those layers alone are visited. `most`: tokens that a step may have; where that is one,
    what its row takes counts as its unit's.

    A missing unit is what reading it from the checkpoint takes, or what those that a host does not hold add to a step
    that asks for all of its own, if that is more. The blocks of the cache are written over.
    """
    timing, read_s = _Timing(backbone, layout, most), _unit_read_s(reader, layout)
    hosts = [_of_host(timing, host, read_s) for host in range(layout.num_hosts)]
    row_s, byte_s, missing_s, dispatch_s = zip(*hosts, strict=True)
    held_LR, num_same = timing.held_by(0), min(_ROWS, most, kv.num_slots // kv.block_size)
    one, same = timing.tokens_of(0, 1, held_LR), timing.tokens_of(0, num_same, held_LR)
    around_s = [max(0.0, timing.step_s(kv, ids) - timing.layers_s(ids)) for ids in (one, same)]
    token_s = max(0.0, (around_s[1] - around_s[0]) / max(1, len(same) - 1))
    return StepCosts(row_s, byte_s, missing_s, max(dispatch_s), max(0.0, around_s[0] - token_s), token_s)


def _of_host(timing: _Timing, host: int, read_s: float) -> tuple[float, float, float, float]:
    """Seconds of a row, of a byte that is held and of one that is missing, and of a layer's way there and back.
    `read_s`: a byte from the checkpoint, which stands for all bytes of a host that is home to nothing."""
    held_LR = timing.held_by(host)
    one, same, held, whole = (
        timing.tokens_of(host, 1, held_LR),
        timing.tokens_of(host, min(_ROWS, timing.most), held_LR),
        timing.units_of(host, held_LR),
        timing.units_of(host),
    )
    (rows, num_bytes), (more_rows, _), (held_rows, held_bytes) = map(timing.counts, (one, same, held))
    if not rows:
        return _LEAST_S, read_s, read_s, _LEAST_S
    one_s, same_s, held_s = (timing.layers_s(ids) for ids in (one, same, held))
    row_s = max(_LEAST_S, (same_s - one_s) / (more_rows - rows)) if more_rows > rows else _LEAST_S
    left_s, left_bytes = held_s - one_s - (held_rows - rows) * row_s, held_bytes - num_bytes
    if not left_bytes:
        left_s, left_bytes = one_s - rows * row_s, num_bytes
    byte_s = max(_LEAST_S, left_s / left_bytes)
    missing_s, (all_rows, all_bytes) = max(read_s, byte_s), timing.counts(whole)
    if all_bytes > held_bytes:
        left_s = timing.layers_s(whole) - held_s - (all_rows - held_rows) * row_s
        missing_s = max(missing_s, left_s / (all_bytes - held_bytes))
    return row_s, byte_s, missing_s, max(_LEAST_S, (one_s - rows * row_s - num_bytes * byte_s) / rows)


class _Timing:
    """Runs steps of made-up paths; the least of some times counts."""

    def __init__(self, backbone: Backbone, layout: UnitLayout, most: int) -> None:
        self._backbone, self.layout, self._cuts, self.most = backbone, layout, backbone.config.cuts, most
        self._exact = backbone.config.routing == "path"
        self._k = max(cut.num_active for cut in self._cuts)
        self._row_D = torch.randn(backbone.config.text_config.hidden_size).to(backbone.device, backbone.dtype)
        self._number = 0

    def held_by(self, host: int) -> np.ndarray | None:
        """Which units the host holds, bool [L, R]; None for all."""
        exchange, give_up_s = self._backbone.exchange, time.monotonic() + _WORD_S
        while (said_LR := exchange.clients[host].units_LR) is None and time.monotonic() < give_up_s:
            time.sleep(_WORD_S / 100)
            exchange.poll()
        return None if exchange.clients[host].held_LR is None else said_LR

    def tokens_of(self, host: int, num_tokens: int, held_LR: np.ndarray | None = None) -> np.ndarray:
        """Paths [T, L, K] of so many tokens, all on the same unit of a host in each layer."""
        ids_TLK = np.repeat(self.units_of(host, held_LR)[:1], num_tokens, axis=0)
        ids_TLK[..., 1:] = -1
        return ids_TLK

    def units_of(self, host: int, held_LR: np.ndarray | None = None) -> np.ndarray:
        """Paths of as many tokens as visit all units of a host, each once or so, or as many as it holds, those of its
        layers in turn: what it holds is in the first layers, or wherever it was last. No more tokens than a step may
        have."""
        layout = self.layout
        units = [layout.expert_U[(layout.layer_U == n) & (layout.host_U == host)] for n in range(len(self._cuts))]
        if held_LR is not None:
            widths = np.array([cut.expert_width for cut in self._cuts])
            for width in np.unique(widths):  # each has slots of its own
                layers = np.flatnonzero(widths == width)
                for layer, num in zip(
                    layers, _in_turn([len(units[n]) for n in layers], held_LR[layers].sum()), strict=True
                ):
                    units[layer] = units[layer][:num]
        width = [min(cut.num_active, len(found)) for cut, found in zip(self._cuts, units, strict=True)]
        num_tokens = max(1, *(-(-len(found) // k) if k else 1 for found, k in zip(units, width, strict=True)))
        ids_TLK = np.full((num_tokens, len(self._cuts), self._k), -1, dtype=np.int16)
        for layer, (found, k) in enumerate(zip(units, width, strict=True)):
            for token in range(num_tokens if k else 0):
                start = min(token * k, len(found) - k)
                ids_TLK[token, layer, :k] = found[start : start + k]
        return ids_TLK[: self.most]

    def counts(self, ids_TLK: np.ndarray) -> tuple[int, float]:
        """Rows, and bytes of units."""
        rows_U = self.layout.rows(ids_TLK)
        return int(rows_U.sum()), float(self.layout.bytes_U[rows_U > 0].sum())

    def layers_s(self, ids_TLK: np.ndarray) -> float:
        """Seconds of the layers' FFNs."""
        exchange, x_TD = self._backbone.exchange, self._row_D.repeat(len(ids_TLK), 1)

        def run() -> None:
            self._begin(ids_TLK)
            for layer, cut in enumerate(self._cuts):
                choice = None
                if not self._exact and cut.num_active:
                    choice = Choice(torch.from_numpy(ids_TLK[:, layer].astype(np.int64)))
                exchange.combine(exchange.dispatch(layer, x_TD, choice))
            exchange.end_step()

        return self._least_s(run)

    def step_s(self, kv: PagedKV, ids_TLK: np.ndarray) -> float:
        """Seconds of a whole step, a first token of as many sequences."""
        num_tokens = len(ids_TLK)
        slices = [SequenceSlice([block], 0, 1) for block in range(num_tokens)]
        zeros = np.zeros(num_tokens, dtype=np.int64)

        def run() -> None:
            self._begin(ids_TLK)
            layout = StepLayout.build(kv, slices, self._backbone.device)
            self._backbone.forward(zeros, zeros, layout, list(range(num_tokens))).argmax(dim=-1).tolist()
            self._backbone.exchange.end_step()

        return self._least_s(run)

    def _begin(self, ids_TLK: np.ndarray) -> None:
        self._number -= 1  # no step that serves has this number
        self._backbone.exchange.begin_step(self._number, len(ids_TLK), Paths(ids_TLK) if self._exact else None)

    def _least_s(self, run: Callable[[], None]) -> float:
        run()
        times: list[float] = []
        while len(times) < _REPEATS or sum(times) < _TIMED_S:
            start_s = time.perf_counter()
            run()
            if torch.device(self._backbone.device).type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start_s)
        return min(times)


def _in_turn(most: Sequence[int], total: int) -> list[int]:
    """Share out at most so many, one to each at a time and no more than `most` to any. Example: [3, 1, 3] and 6 give
    [3, 1, 2]."""
    rounds = [(taken, place) for place, num in enumerate(most) for taken in range(num)]
    places = [place for _, place in sorted(rounds)[:total]]
    return [places.count(place) for place in range(len(most))]


def _unit_read_s(reader: CheckpointReader, layout: UnitLayout) -> float:
    """Seconds a byte of a unit takes that is read from the checkpoint."""
    layer, expert = int(layout.layer_U[0]), int(layout.expert_U[0])
    times, out = [], reader.read_unit(layer, expert)
    for _ in range(3):
        start_s = time.perf_counter()
        reader.read_unit(layer, expert, out)
        times.append(time.perf_counter() - start_s)
    return max(_LEAST_S, min(times) / reader.unit_bytes(layer))
