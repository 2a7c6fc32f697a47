"""Timing the expert FFN: shapes, routings, rotated weights, interleaved runs; what `pregate bench kernels` prints.

Shape letters: T tokens, L layers, K experts per token, R routed experts, D hidden width, M expert width.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from pregate.base.errors import UserError
from pregate.base.log import get_logger
from pregate.kernels.contract import ExpertFFN
from pregate.kernels.units import LayerUnits

ROUTINGS = ("uniform", "zipf", "grouped")
#: What a rotation of layers must exceed, so that no cache holds the weights from one call to the next.
ROTATED_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}

_log = get_logger(__name__)


@dataclass(frozen=True)
class Shape:
    """A dense FFN of `width` cut into `num_experts` slices, one of them shared; `act` silu."""

    name: str
    hidden: int
    width: int
    num_experts: int = 8

    @property
    def expert_width(self) -> int:
        return self.width // self.num_experts

    @property
    def num_routed(self) -> int:
        return self.num_experts - 1

    def num_active(self, percent: int) -> int:
        """Routed experts per token at `percent` of the FFN active, the shared expert counted."""
        return self.num_experts * percent // 100 - 1

    def flops(self, num_tokens: int) -> int:
        """Operations of the dense FFN."""
        return 6 * num_tokens * self.hidden * self.width

    def num_layers(self, dtype: torch.dtype, device: str) -> int:
        """Layers to rotate over."""
        layer_bytes = 3 * self.hidden * self.width * dtype.itemsize
        return max(1, -(-ROTATED_BYTES[device] // layer_bytes))


SHAPES = (Shape("llama-2-7b", 4096, 11008), Shape("1b", 2048, 5632), Shape("quartet", 192, 640))


def shape_named(name: str) -> Shape:
    """Return a shape of `SHAPES`; UserError names those there are."""
    for shape in SHAPES:
        if shape.name == name:
            return shape
    raise UserError.of("--shape", name, f"allowed: {', '.join(s.name for s in SHAPES)}")


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """Weights of one dense FFN, and the same weights cut: slice 0 shared, the others routed."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_RMD: torch.Tensor
    down_RDM: torch.Tensor
    shared: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> DenseLayer:
        """Normal weights; never zeros, on which matrix units draw less power and run faster."""
        generator = torch.Generator(device).manual_seed(seed)
        gate_up_EMD = torch.empty(shape.num_experts, 2 * shape.expert_width, shape.hidden, dtype=dtype, device=device)
        down_EDM = torch.empty(shape.num_experts, shape.hidden, shape.expert_width, dtype=dtype, device=device)
        gate_up_EMD.normal_(std=shape.hidden**-0.5, generator=generator)
        down_EDM.normal_(std=shape.width**-0.5, generator=generator)
        halves = gate_up_EMD.unflatten(1, (2, -1)).transpose(0, 1)
        gate_up = halves.reshape(-1, shape.hidden)
        down = down_EDM.transpose(0, 1).reshape(shape.hidden, -1)
        return cls(gate_up, down, gate_up_EMD[1:], down_EDM[1:], (gate_up_EMD[0], down_EDM[0]))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The dense FFN: gate and up in one product, as inference engines run it."""
        gate_TM, up_TM = F.linear(x_TD, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate_TM) * up_TM, self.down)

    def units(self, ffn: ExpertFFN) -> LayerUnits:
        return ffn.units(self.shared, 1, self.gate_up_RMD, self.down_RDM)


def route(kind: str, num_tokens: int, num_routed: int, num_k: int, generator: torch.Generator) -> torch.Tensor:
    """Return ids int64 [T, K], ascending. `uniform`; `zipf` (weight 1 / rank); `grouped`: all tokens on one path."""
    if kind == "grouped":
        return torch.randperm(num_routed, generator=generator)[:num_k].sort().values.expand(num_tokens, num_k).clone()
    weights_R = 1 / torch.arange(1, num_routed + 1) if kind == "zipf" else torch.ones(num_routed)
    picks_TK = torch.multinomial(weights_R.expand(num_tokens, num_routed), num_k, generator=generator)
    return picks_TK.sort(dim=1).values


def time_ms(
    runs: Mapping[str, Callable[[int], object]],
    num_layers: int,
    *,
    budget_s: float,
    device: torch.device,
    min_turns: int = 3,
) -> dict[str, float]:
    """Return the time of each run, called with the layers in rotation, all in turn so that they meet the same noise.

    On a CPU: the lower quartile of the calling thread's CPU time (torch must have one thread), which a busy machine
    disturbs least; `budget_s` ends the turns once there were `min_turns`. On CUDA: the median of replays of a graph
    over all layers; a run that waits for the device cannot be captured, is timed as plain calls, and is logged.
    """
    if device.type == "cuda":
        return {name: _cuda_ms(name, run, num_layers) for name, run in runs.items()}
    taken_s: dict[str, list[float]] = {name: [] for name in runs}
    layers = itertools.cycle(range(num_layers))
    stop_s = time.perf_counter() + budget_s
    for turn in range(200):
        for name, run in runs.items():
            started_s = time.thread_time()
            run(next(layers))
            taken_s[name].append(time.thread_time() - started_s)
        if turn + 1 >= min_turns and time.perf_counter() > stop_s:
            break
    return {name: sorted(taken)[len(taken) // 4] * 1e3 for name, taken in taken_s.items()}


def is_capture_error(error: RuntimeError) -> bool:
    """True where CUDA or torch refused only to record a call in a graph, as where the call waits for the device."""
    return "captur" in str(error)


def _cuda_ms(name: str, run: Callable[[int], object], num_layers: int, num_replays: int = 20) -> float:
    """Milliseconds of one call: a CUDA graph over all layers, or plain calls where the run needs the host."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for layer in range(num_layers):
            run(layer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for layer in range(num_layers):
                run(layer)
        replay = graph.replay
    except RuntimeError as error:
        if not is_capture_error(error):
            raise
        _log.warning("%s waits for the device, which is part of what it costs: timed as plain calls", name)
        torch.cuda.synchronize()

        def replay() -> None:
            for layer in range(num_layers):
                run(layer)

    taken = []
    for _ in range(num_replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / num_layers)
    return sorted(taken)[num_replays // 2]
