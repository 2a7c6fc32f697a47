"""What one FFN layer costs: the expert FFN beside dense, grouped_mm, transformers' experts and a loop, same data.

    python -m benchmarks.kernels --out benchmarks/results/kernels.json
    python -m benchmarks.kernels --device cuda --dtype bfloat16 --out benchmarks/results/kernels_cuda.json

Dense FFNs of three shapes are cut into 8 slices, one shared, so that 25, 50 or 75 % are active. Weights rotate over
enough layers that no cache holds them. All contenders of a cell run in turn. Routing metadata is made before the clock
starts, for every contender that takes it, and is timed apart; transformers' sort their rows themselves. A picture and
tables go beside the JSON, which is written after every cell: --resume measures what it lacks. Cells whose dense FFN
takes more than 75 GFLOP are timed in 2 turns on a CPU, all others in at least 3; those above --max-gflop are left out,
and listed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from benchmarks.kernel_report import Report
from benchmarks.surroundings import surroundings
from pregate.base.dtypes import dtype_name
from pregate.kernels import segments
from pregate.kernels.contract import ExpertFFN
from pregate.kernels.cpu import packed as cpu_packed
from pregate.kernels.cpu.ffn import grouped_mm
from pregate.kernels.expert_ffn import choose, choose_dtype, why_not
from pregate.kernels.tools import bench
from pregate.kernels.tools.bench import ROUTINGS, SHAPES, DenseLayer, Shape

PERCENTS = (25, 50, 75)
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
#: Layers that the metadata is timed for, as a step makes it for all at once.
METADATA_LAYERS = 32
#: transformers' batched experts copy the weights of every pair: beyond this they only fill the memory.
MAX_BATCHED_TOKENS = 4
#: A dense FFN of more operations takes about a second or more on a CPU: fewer turns, whose spread is small by then.
LARGE_FLOPS, LARGE_TURNS, TURNS = 75e9, 2, 3
Run = Callable[[int], object]


class TransformersExperts:
    """transformers' own experts module over our weights, with the shared expert added as its blocks do."""

    def __init__(self, implementation: str, shape: Shape, layers: list[DenseLayer]) -> None:
        config = SimpleNamespace(
            num_experts=shape.num_routed,
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.expert_width,
            hidden_act="silu",
            _experts_implementation=implementation,
        )
        self._layers = layers
        self._modules = []
        for layer in layers:
            with torch.device("meta"):
                module = Qwen2MoeExperts(config)
            module.gate_up_proj = torch.nn.Parameter(layer.gate_up_RMD, requires_grad=False)
            module.down_proj = torch.nn.Parameter(layer.down_RDM, requires_grad=False)
            self._modules.append(module)

    def run(self, x_TD: torch.Tensor, ids_TK: torch.Tensor) -> Run:
        ones_TK = torch.ones(ids_TK.shape, dtype=x_TD.dtype, device=x_TD.device)
        return lambda n: self._modules[n](x_TD, ids_TK, ones_TK) + dense(x_TD, *self._layers[n].shared)


def dense(x_TD: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate_TM, up_TM = F.linear(x_TD, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate_TM) * up_TM, down)


def grouped(x_TD: torch.Tensor, segment: segments.Segment, layer: DenseLayer) -> torch.Tensor:
    """Plain torch: gather, grouped_mm twice, scatter; `segment` without shared units."""
    row_token, ends_R = segment.row_token.long(), segment.offsets[1:]
    h_PM = grouped_mm()(x_TD[row_token], layer.gate_up_RMD.transpose(1, 2), offs=ends_R)
    gate_PM, up_PM = h_PM.chunk(2, dim=-1)
    y_PD = grouped_mm()(F.silu(gate_PM) * up_PM, layer.down_RDM.transpose(1, 2), offs=ends_R)
    return dense(x_TD, *layer.shared).index_add_(0, row_token, y_PD)


def loop(x_TD: torch.Tensor, pieces: list[tuple[int, torch.Tensor]], layer: DenseLayer) -> torch.Tensor:
    """One product per expert and half; `pieces` are each expert's token rows."""
    out_TD = dense(x_TD, *layer.shared)
    for expert, tokens in pieces:
        out_TD.index_add_(0, tokens, dense(x_TD[tokens], layer.gate_up_RMD[expert], layer.down_RDM[expert]))
    return out_TD


class Stage:
    """The layers of one shape in every form its contenders need."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        number = shape.num_layers(dtype, device.type)
        self.layers = [DenseLayer.random(shape, dtype, device, seed) for seed in range(number)]
        widths = (shape.hidden, shape.expert_width)
        lossy = ("triton-int8", "triton-fp8") if device.type == "cuda" else ("int8",)
        names = ["auto", *(name for name in lossy if not why_not(name, device, dtype, "silu", widths))]
        self.ffns: dict[str, ExpertFFN] = {n: choose(n, device, dtype, act="silu", widths=widths) for n in names}
        self.units = {name: [layer.units(ffn) for layer in self.layers] for name, ffn in self.ffns.items()}
        self.transformers = {
            f"transformers {name}": TransformersExperts(f"{name}_mm", shape, self.layers)
            for name in ("grouped", "batched")
        }
        # The dense FFN through our own entry point: what the cut gains when both sides use the same products.
        same = self.ffns["auto"]
        self.dense_weights = [same.stack(layer.gate_up[None], layer.down[None]) for layer in self.layers]

    def runs(self, x_TD: torch.Tensor, ids_TK: torch.Tensor) -> dict[str, Run]:
        num_tokens = len(x_TD)
        plain = segments.build(ids_TK.cpu()[:, None], self.shape.num_routed).to(self.device).layer(0)
        pieces = [(e, torch.where((ids_TK == e).any(dim=1))[0]) for e in ids_TK.unique().tolist()]
        same = self.ffns["auto"]
        runs: dict[str, Run] = {
            "dense": lambda n: self.layers[n].forward(x_TD),
            "dense, our products": lambda n: same.dense(x_TD, self.dense_weights[n]),
        }
        for name, ffn in self.ffns.items():
            segment = ffn.segments(ids_TK[:, None], self.shape.num_routed, 1).layer(0)
            runs["pregate" if name == "auto" else f"pregate {name}"] = lambda n, f=ffn, s=segment, u=self.units[name]: (
                f.layer(x_TD, s, u[n])
            )
        runs["grouped_mm"] = lambda n: grouped(x_TD, plain, self.layers[n])
        runs["loop"] = lambda n: loop(x_TD, pieces, self.layers[n])
        for name, experts in self.transformers.items():
            if name.endswith("grouped") or num_tokens <= MAX_BATCHED_TOKENS:
                runs[name] = experts.run(x_TD, ids_TK)
        return runs

    def check(self, runs: dict[str, Run]) -> float:
        """The largest difference of any exact contender from the loop, over the loop's largest value."""
        wanted: Any = runs["loop"](0)
        exact = [name for name in runs if not name.startswith("dense") and "8" not in name]
        got: list[Any] = [runs[name](0) for name in exact]
        worst = max(((g - wanted).abs().max() / wanted.abs().max()).item() for g in got)
        limit = 1e-4 if self.dtype == torch.float32 else 0.05
        if not worst < limit:
            raise SystemExit(f"{self.shape.name}: contenders differ by {worst}")
        return worst


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measured bounds of this machine: copy (bytes read and written), reading, and the best matrix product."""
    big = torch.randn((256 << 20) // dtype.itemsize, device=device).to(dtype)
    other = torch.empty_like(big)
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    runs: dict[str, Run] = {"copy": lambda _: other.copy_(big), "read": lambda _: big.sum(), "mm": lambda _: a @ b}
    if device.type == "cpu":
        packed = cpu_packed.onednn_product(b)
        runs["packed"] = lambda _: packed(a)
    taken_ms = bench.time_ms(runs, 1, budget_s=6.0, device=device)
    best_ms = min(taken_ms["mm"], taken_ms.get("packed", float("inf")))
    return {
        "copy_gbyte_s": 2 * big.nbytes / taken_ms["copy"] / 1e6,
        "read_gbyte_s": big.nbytes / taken_ms["read"] / 1e6,
        "matmul_gflop_s": 2 * 2048**3 / best_ms / 1e6,
        "mkl_or_cublas_gflop_s": 2 * 2048**3 / taken_ms["mm"] / 1e6,
    }


def metadata_ms(shape: Shape, ids_TK: torch.Tensor, ffn: ExpertFFN, device: torch.device) -> float:
    """Milliseconds per layer to sort a step of 32 layers, as it is done before layer 0."""
    ids_TLK = ids_TK.cpu()[:, None].expand(-1, METADATA_LAYERS, -1).contiguous()
    taken = []
    for _ in range(5):
        started_s = time.perf_counter() if device.type == "cuda" else time.thread_time()
        built = ffn.segments(ids_TLK, shape.num_routed, 1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        else:
            _ = [built.layer(n) for n in range(METADATA_LAYERS)]
        ended_s = time.perf_counter() if device.type == "cuda" else time.thread_time()
        taken.append(ended_s - started_s)
    return sorted(taken)[1] * 1e3 / METADATA_LAYERS


def wanted_cells(shape: Shape, arguments: argparse.Namespace, report: Report) -> Iterator[tuple[int, int, str]]:
    """Tokens, percent and routing of every cell of `shape` that is to be measured."""
    for cell in itertools.product(arguments.tokens, arguments.percents, arguments.routings):
        if shape.flops(cell[0]) <= arguments.max_gflop * 1e9 and (shape.name, *cell) not in report:
            yield cell


def measure(
    stage: Stage, num_tokens: int, percent: int, routing: str, budget_s: float, bounds: dict[str, float]
) -> dict[str, Any]:
    """Measure one cell; its inputs depend on nothing but what it is."""
    shape, started_s = stage.shape, time.perf_counter()
    generator = torch.Generator().manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, shape.hidden, generator=generator).to(stage.device, stage.dtype)
    generator.manual_seed(num_tokens * 1000 + percent * 10 + ROUTINGS.index(routing))
    ids_TK = bench.route(routing, num_tokens, shape.num_routed, shape.num_active(percent), generator).to(stage.device)
    runs = stage.runs(x_TD, ids_TK)
    differs = stage.check(runs)
    min_turns = LARGE_TURNS if shape.flops(num_tokens) > LARGE_FLOPS else TURNS
    taken_ms = bench.time_ms(runs, len(stage.layers), budget_s=budget_s, device=stage.device, min_turns=min_turns)
    return describe(stage, ids_TK, percent, routing, taken_ms, bounds) | {
        "differs": differs,
        "metadata_ms_per_layer": metadata_ms(shape, ids_TK, stage.ffns["auto"], stage.device),
        "min_turns": min_turns,
        "seconds": round(time.perf_counter() - started_s, 1),
    }


def describe(
    stage: Stage,
    ids_TK: torch.Tensor,
    percent: int,
    routing: str,
    taken_ms: dict[str, float],
    bounds: dict[str, float],
) -> dict[str, Any]:
    """Times, and what they mean against the machine's bounds."""
    shape, (num_tokens, num_k) = stage.shape, ids_TK.shape
    units = 1 + len(ids_TK.unique())
    weight_bytes = units * 3 * shape.hidden * shape.expert_width * stage.dtype.itemsize
    flops = shape.flops(num_tokens) * (1 + num_k) / shape.num_experts
    ours_ms = taken_ms["pregate"]
    return {
        "shape": shape.name,
        "tokens": num_tokens,
        "percent": percent,
        "routing": routing,
        "implementation": stage.ffns["auto"].name,
        "units_read": units,
        "ms": {name: round(value, 4) for name, value in taken_ms.items()},
        "speedup_over_dense": round(taken_ms["dense"] / ours_ms, 3),
        "speedup_over_dense_same_products": round(taken_ms["dense, our products"] / ours_ms, 3),
        "share_of_copy": round(weight_bytes / ours_ms / 1e6 / bounds["copy_gbyte_s"], 3),
        "share_of_matmul": round(flops / ours_ms / 1e6 / bounds["matmul_gflop_s"], 3),
    }


def line(cell: dict[str, Any]) -> str:
    times = "  ".join(f"{name} {value:.3g}" for name, value in cell["ms"].items())
    head = f"{cell['shape']:10} {cell['tokens']:5d} {cell['percent']} % {cell['routing']:8}"
    return f"{head} {cell['speedup_over_dense']:6.2f}x ({cell['speedup_over_dense_same_products']:.2f}x)  {times}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in SHAPES])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--percents", type=int, nargs="+", default=PERCENTS, choices=PERCENTS)
    parser.add_argument("--routings", nargs="+", default=ROUTINGS, choices=ROUTINGS)
    parser.add_argument("--max-gflop", type=float, default=float("inf"), help="of the dense FFN; default: no limit")
    parser.add_argument("--budget-s", type=float, default=0.5, help="per cell, after the least number of turns")
    parser.add_argument("--out", type=Path, help="write JSON here, tables and a picture beside it")
    parser.add_argument("--resume", action="store_true", help="keep the cells of --out and measure only the others")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device; allowed here: cpu")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)  # now, not after the first cell
    return arguments


def start_report(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Report:
    """What is known before the first cell."""
    left_out = [
        f"{shape.name} at {tokens} tokens"
        for shape in map(bench.shape_named, arguments.shapes)
        for tokens in arguments.tokens
        if shape.flops(tokens) > arguments.max_gflop * 1e9
    ]
    on_cpu = device.type == "cpu"
    return Report(
        arguments.out,
        {
            **surroundings("kernels", ("transformers",)),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
            "dtype": dtype_name(dtype),
            "clock": f"CPU time of the calling thread, lower quartile of {TURNS} turns or more, the lesser of "
            f"{LARGE_TURNS} where the dense FFN takes more than {LARGE_FLOPS / 1e9:.0f} GFLOP"
            if on_cpu
            else "CUDA graph replays, plain calls of what waits for the host",
            "ceilings": ceilings(device, dtype),
            "left_out": left_out,
        },
    )


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    started_s, device = time.perf_counter(), torch.device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    with torch.inference_mode():
        report = start_report(arguments, device, dtype)
        if arguments.resume:
            report.resume()
        bounds = report.whole(0)["ceilings"]
        print({name: round(value, 1) for name, value in bounds.items()}, flush=True)
        for shape in map(bench.shape_named, arguments.shapes):
            wanted = list(wanted_cells(shape, arguments, report))
            if not wanted:
                continue
            stage = Stage(shape, device, dtype)
            for num_tokens, percent, routing in wanted:
                cell = measure(stage, num_tokens, percent, routing, arguments.budget_s, bounds)
                print(line(cell), flush=True)
                report.add(cell, time.perf_counter() - started_s)
            del stage
            gc.collect()
    report.finish(time.perf_counter() - started_s)


if __name__ == "__main__":
    main()
