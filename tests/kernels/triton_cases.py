"""Every case of the Triton kernels against float64 plain torch, as a program: one line of JSON per case.

Triton decides at import whether it interprets, so the tests run this in a process of its own:

    TRITON_INTERPRET=1 python tests/kernels/triton_cases.py cpu
    python tests/kernels/triton_cases.py cuda

Inputs are fresh in each run (the seed is in each line) and every buffer starts as NaN. Never bf16 in the interpreter:
its bf16 product is silently wrong.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from pregate.base.errors import PregateError
from pregate.kernels import expert_ffn, segments
from pregate.kernels.tools import bench
from pregate.kernels.tools import tune_block_sizes as tune
from pregate.kernels.triton import ffn as triton_ffn
from pregate.kernels.triton.block_sizes import TABLE_PATH, BlockSizes, BlockTable
from pregate.kernels.triton.ffn import TritonFFN
from pregate.kernels.triton.segments import build_on_device
from pregate.kernels.units import GroupRows, LayerUnits
from pregate.kernels.weights import quantise_rows, split_shared

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}


#: Batches that every dtype is held to: one token, those around the decode kernels' limit, and ragged tails of tiles;
#: smaller ones in the interpreter, which took more than half of its time for 257.
TOKENS = {"cuda": (1, 2, 7, 8, 9, 64, 257), "cpu": (1, 2, 7, 8, 9, 33, 70)}


@dataclass(frozen=True)
class Case:
    """One run. `routing`: uniform, one (an expert takes all), ragged (tokens have 0 to k experts)."""

    name: str
    tokens: int = 9
    routed: int = 4
    shared: int = 1
    k: int = 2
    hidden: int = 80
    width: int = 72
    dtype: str = "float32"
    act: str = "silu"
    routing: str = "uniform"
    block_m: int = 0
    by: str = "layer"
    weighted: bool = False
    tma: bool = False
    quant: str = ""


def cases(device: torch.device) -> list[Case]:
    numbers = TOKENS[device.type]
    on_device = [Case(f"{t} tokens bf16", tokens=t, dtype="bfloat16", k=3) for t in (*numbers, 1000)]
    return [
        *(on_device if device.type == "cuda" else []),
        *(Case(f"{t} tokens", tokens=t) for t in numbers),
        *(Case(f"{t} tokens fp16", tokens=t, dtype="float16", k=3, weighted=t % 2 == 0) for t in numbers),
        *(Case(f"{k} of 4 experts, {t} tokens", tokens=t, k=k, dtype="float16") for k in (1, 2, 3, 4) for t in (5, 21)),
        Case("8 tokens ragged fp16", tokens=8, routing="ragged", dtype="float16"),
        Case("40 tokens ragged fp16", tokens=40, routing="ragged", dtype="float16", k=4),
        Case("65 tokens fp16 swapped", tokens=65, dtype="float16", block_m=16),
        Case("ragged with weights", tokens=33, routing="ragged", weighted=True, act="gelu_pytorch_tanh"),
        Case("one expert takes all", tokens=40, routing="one", k=1, act="gelu"),
        Case("one expert takes all of 8", tokens=8, routing="one", k=1),
        Case("every expert", tokens=20, k=4),
        Case("every expert of 3 tokens", tokens=3, k=4, weighted=True),
        Case("shared only", tokens=17, routed=0, k=0, shared=2),
        Case("shared only fp16", tokens=65, routed=0, k=0, shared=1, dtype="float16"),
        Case("shared only, 2 tokens", tokens=2, routed=0, k=0, shared=2),
        Case("no shared", tokens=19, shared=0, routing="ragged"),
        Case("no shared, 5 tokens", tokens=5, shared=0, routing="ragged"),
        Case("width 192 in blocks of 128", tokens=40, width=192, block_m=64, dtype="float16"),
        Case("tiles of 128", tokens=140, k=1, block_m=128, dtype="float16"),
        Case("tma", tokens=30, tma=True, hidden=72),
        Case("tma fp16 ragged", tokens=25, tma=True, hidden=136, dtype="float16", routing="ragged"),
        Case("int8", tokens=30, quant="int8"),
        Case("int8, 4 tokens", tokens=4, quant="int8", dtype="float16"),
        Case("fp8", tokens=30, quant="float8_e4m3fn"),
        Case("pairs", tokens=21, by="pairs"),
        Case("pairs of 1 row", tokens=1, by="pairs", dtype="float16"),
        Case("absent units, unused", tokens=12, by="absent unused"),
        Case("absent units", tokens=12, by="absent"),
        Case("absent units of 2 tokens", tokens=2, by="absent"),
        Case("absent units of a group", tokens=5, by="absent pairs"),
        Case("ids that are no expert", tokens=12, by="bad ids"),
        Case("ids that are no expert of 4 tokens", tokens=4, by="bad ids", dtype="float16"),
        Case("absent units, unchecked", tokens=12, by="absent unchecked"),
        Case("absent units of 2 tokens, unchecked", tokens=2, by="absent unchecked"),
        *([Case("captured in a graph", tokens=40, by="graph")] if device.type == "cuda" else []),
        Case("tuned", hidden=64, width=16, by="tune"),
        Case("segments of 5 tokens", tokens=5, by="segments", routing="ragged", block_m=2),
        Case("segments of 300 tokens", tokens=300, by="segments", routing="ragged", k=3, routed=6, weighted=True),
    ]


class Inputs:
    """Random inputs of a case, and the float64 answer."""

    def __init__(self, case: Case, device: torch.device, generator: torch.Generator) -> None:
        self.case, self.device = case, device
        self.dtype = getattr(torch, case.dtype)

        def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(self.dtype)

        hidden, width = case.hidden, case.width
        self.x_TD = randn(case.tokens, hidden)
        self.gate_up_RMD = randn(case.routed, 2 * width, hidden, scale=hidden**-0.5)
        self.down_RDM = randn(case.routed, hidden, width, scale=width**-0.5)
        shared_width = case.shared * width
        self.shared = (
            (randn(2 * shared_width, hidden, scale=hidden**-0.5), randn(hidden, shared_width, scale=width**-0.5))
            if case.shared
            else None
        )
        self.ids_TK = self._ids(generator)
        self.weights_TK = torch.rand(case.tokens, case.k, generator=generator) if case.weighted else None

    def _ids(self, generator: torch.Generator) -> torch.Tensor:
        case = self.case
        scores = torch.rand(case.tokens, max(case.routed, 1), generator=generator)
        ids = scores.argsort(dim=1)[:, : case.k].sort(dim=1).values
        if case.routing == "one":
            return torch.full_like(ids, case.routed - 2)
        if case.routing == "ragged":
            # Expert 1 stays empty, tokens have 0 to k experts.
            ids = torch.where((torch.rand(ids.shape, generator=generator) < 0.4) | (ids == 1), -1, ids)
        return ids

    def expert(self, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        if self.case.quant:
            parts = (quantise_rows(part, getattr(torch, self.case.quant)) for part in (gate_up, down))
            gate_up, down = (values.double() * scale[:, None].double() for values, scale in parts)
        gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=-1)
        return (ACTIVATIONS[self.case.act](gate) * up) @ down.double().T

    def answer(self) -> torch.Tensor:
        """float64 [T, D], token by token."""
        out = torch.zeros(self.x_TD.shape, dtype=torch.float64)
        if self.shared is not None:
            # Slice by slice, as rows are quantised slice by slice.
            for gate_up, down in split_shared(*self.shared, self.case.shared):
                out += self.expert(self.x_TD, gate_up, down)
        for token, ids in enumerate(self.ids_TK.tolist()):
            for column, expert in enumerate(ids):
                if expert >= 0:
                    y = self.expert(self.x_TD[token], self.gate_up_RMD[expert], self.down_RDM[expert])
                    out[token] += y if self.weights_TK is None else y * self.weights_TK[token, column]
        return out

    def on_device(self, name: str) -> torch.Tensor:
        return getattr(self, name).to(self.device)


def make_ffn(case: Case, inputs: Inputs) -> TritonFFN:
    weight_dtype = getattr(torch, case.quant) if case.quant else None
    tma = None if inputs.device.type == "cuda" else case.tma
    return TritonFFN(case.act, inputs.device, inputs.dtype, weight_dtype=weight_dtype, tma=tma)


def run_layer(case: Case, inputs: Inputs, unit_slot: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    ffn = make_ffn(case, inputs)
    shared = (inputs.shared[0].to(inputs.device), inputs.shared[1].to(inputs.device)) if inputs.shared else None
    units = ffn.units(shared, case.shared, inputs.on_device("gate_up_RMD"), inputs.on_device("down_RDM"))
    # Any unit in any slot: the weights are laid out in a random order.
    order = np.random.default_rng(case.tokens).permutation(units.weights.num_slots)
    mixed = ffn.layout.allocate(len(order), case.width, case.hidden)
    for unit, slot in enumerate(order):
        ffn.layout.move(units.weights, unit, mixed, int(slot))
    slots = order.astype(np.int32)
    if unit_slot is not None:
        slots = np.where(unit_slot < 0, -1, slots).astype(np.int32)
    built = segments.build(
        inputs.ids_TK[:, None],
        case.routed,
        num_shared=case.shared,
        block_m=case.block_m or ffn.block_m(case.tokens * (case.shared + case.k), case.shared + case.routed),
        weights_TLK=None if inputs.weights_TK is None else inputs.weights_TK[:, None],
    )
    segment = built.to(inputs.device).layer(0)
    return ffn.layer(inputs.on_device("x_TD"), segment, LayerUnits(mixed, slots)).cpu(), inputs.answer()


def run_pairs(case: Case, inputs: Inputs, absent: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A host's group: pairs sorted by expert, slots in descending order."""
    ffn = make_ffn(case, inputs)
    places = sorted((e, t) for t, row in enumerate(inputs.ids_TK.tolist()) for e in row if e >= 0)
    expert, token = (list(part) for part in zip(*places, strict=True))
    used, counts = np.unique(expert, return_counts=True)
    slots = case.routed - 1 - used
    flipped = (inputs.on_device(name).flip(0).contiguous() for name in ("gate_up_RMD", "down_RDM"))
    weights = ffn.stack(*flipped)
    if absent:
        slots[-1] = -1
    y = ffn.pairs(inputs.on_device("x_TD"), GroupRows(slots, counts, np.array(token)), weights).cpu()
    wanted = [
        inputs.expert(inputs.x_TD[t], inputs.gate_up_RMD[e], inputs.down_RDM[e])
        for e, t in zip(expert, token, strict=True)
    ]
    return y, torch.stack(wanted)


def run_segments(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The device's segments of three layers are those of the host, all buffers laid end to end."""
    ids_TLK = torch.stack([inputs.ids_TK, inputs.ids_TK.flip(0), torch.full_like(inputs.ids_TK, -1)], dim=1)
    block_m = case.block_m or 64
    host = segments.build(ids_TLK, case.routed, num_shared=case.shared, block_m=block_m)
    device = build_on_device(
        ids_TLK.to(inputs.device, torch.int32), case.routed, num_shared=case.shared, block_m=block_m
    )
    device.check_ids()
    if inputs.weights_TK is not None:
        weights_TLK = inputs.weights_TK[:, None].expand(-1, 3, -1)
        host = segments.with_weights(host, weights_TLK)
        device = segments.with_weights(device, weights_TLK.to(inputs.device))
    names = ("row_token", "row_pair", "row_of", "offsets", "tiles", "num_tiles", *["row_weight"] * case.weighted)
    pick = [torch.cat([getattr(s, name).cpu().double().reshape(-1) for name in names]) for s in (device, host)]
    return pick[0], pick[1]


def run_tune(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Three candidates per row: one does not fit, the last is said to be the fastest and becomes every row.

    Where none fits there is no table. Written into a copy of the package's file it is read back by its device's name.
    """
    shape = bench.Shape("tiny", case.hidden, 8 * case.width)
    ffn = TritonFFN("silu", inputs.device, torch.float16, tma=False)
    runs: list[int] = []

    def timer(call: Callable[[], object]) -> float:
        runs.append(1)
        if len(runs) % 3:
            return math.inf if len(runs) % 3 == 1 else 2.0
        call()
        return 1.0

    def choices(kernel: str, block_m: int) -> Iterator[BlockSizes]:
        yield BlockSizes(64, 64, 4, 2)
        yield ffn.table.sizes(kernel, block_m)
        yield BlockSizes(32, 32, 4, 2)

    table = tune.tune(ffn, shape, inputs.device, torch.float16, timer=timer, choices=choices)
    try:
        tune.tune(ffn, shape, inputs.device, torch.float16, timer=lambda call: math.inf, choices=choices)
        said = "nothing"
    except PregateError as error:
        said = str(error)
    assert "none of 3 block sizes fits" in said, said
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        path.write_text(TABLE_PATH.read_text())
        table.save(path)
        assert BlockTable.load(table.device, path).by_rows == table.by_rows
        assert BlockTable.load("", path).by_rows == BlockTable.load("").by_rows, "the other rows stay"
    found = [sizes == BlockSizes(32, 32, 4, 2) for rows in table.by_rows.values() for sizes in rows.values()]
    return torch.tensor(found).double(), torch.ones(10, dtype=torch.float64)


def run_absent(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """A used unit without a slot must raise; one that nobody uses must not matter."""
    unit_slot = np.zeros(case.shared + case.routed, dtype=np.int32)
    if case.by == "absent unchecked":
        return run_unchecked(case, inputs)
    if case.by == "absent unused":
        inputs.ids_TK[inputs.ids_TK == 3] = -1
        unit_slot[case.shared + 3] = -1
        return run_layer(case, inputs, unit_slot)
    unit_slot[case.shared + int(inputs.ids_TK[0, 0])] = -1
    try:
        run_pairs(case, inputs, absent=True) if case.by == "absent pairs" else run_layer(case, inputs, unit_slot)
    except PregateError:
        return torch.zeros(1), torch.zeros(1)
    return torch.full((1,), torch.inf), torch.zeros(1)


def run_unchecked(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Where nobody checked, the rows of a unit without a slot are NaN and all others are right."""
    ffn = make_ffn(case, inputs)
    assert inputs.shared is not None
    units = ffn.units(inputs.shared, case.shared, inputs.gate_up_RMD, inputs.down_RDM)
    slots = units.unit_slot.copy()
    slots[case.shared + 2] = -1
    unchecked = LayerUnits(units.weights, slots)
    unchecked.__dict__["has_gaps"] = False
    # At least one token that does not use the unit and one that does.
    inputs.ids_TK[0], inputs.ids_TK[-1] = torch.tensor([0, 1]), torch.tensor([1, 2])
    built = segments.build(inputs.ids_TK[:, None], case.routed, num_shared=case.shared, block_m=16)
    got = ffn.layer(inputs.on_device("x_TD"), built.to(inputs.device).layer(0), unchecked).cpu()
    hit_T = (inputs.ids_TK == 2).any(dim=1)
    wanted = inputs.answer()
    assert hit_T.any() and not hit_T.all(), "the case must have tokens of both kinds"
    assert got[hit_T].isnan().all(), "an absent unit must not look like numbers"
    return got[~hit_T], wanted[~hit_T]


def run_bad_ids(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids below -1 and past the last expert: the device says so, their tokens are NaN, all others are right."""
    wanted = inputs.answer()
    inputs.ids_TK[0, 1], inputs.ids_TK[2, 0] = case.routed, -2
    ffn = make_ffn(case, inputs)
    shared = inputs.shared and (inputs.shared[0].to(inputs.device), inputs.shared[1].to(inputs.device))
    units = ffn.units(shared, case.shared, inputs.on_device("gate_up_RMD"), inputs.on_device("down_RDM"))
    ids_T2K = torch.stack([inputs.ids_TK.clamp(-1, case.routed - 1), inputs.ids_TK], dim=1)
    built = build_on_device(ids_T2K.to(inputs.device, torch.int32), case.routed, num_shared=case.shared, block_m=16)
    tiles_X3 = built.tiles[1].cpu()
    assert int(built.num_tiles[1]) == int((tiles_X3[:, 2] > tiles_X3[:, 1]).sum()), "tiles of no unit were counted"
    got = ffn.layer(inputs.on_device("x_TD"), built.layer(1), units).cpu()
    try:
        built.check_ids()
        said = "nothing"
    except ValueError as error:
        said = str(error)
    assert said == "expert ids must lie in [-1, 4); others, by layer: {1: 2}", said
    assert got[[0, 2]].isnan().all(), "a token with an id that is no expert must not look like numbers"
    right = [token for token in range(case.tokens) if token not in (0, 2)]
    return got[right], wanted[right]


def run_graph(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Segments and layer captured once as a CUDA graph, replayed with other ids."""
    ffn = make_ffn(case, inputs)
    assert inputs.shared is not None
    shared = (inputs.shared[0].to(inputs.device), inputs.shared[1].to(inputs.device))
    units = ffn.units(shared, case.shared, inputs.on_device("gate_up_RMD"), inputs.on_device("down_RDM"))
    x_TD = inputs.on_device("x_TD")
    ids_T1K = inputs.ids_TK.flip(0)[:, None].to(inputs.device, torch.int32).contiguous()

    def step() -> torch.Tensor:
        built = build_on_device(ids_T1K, case.routed, num_shared=case.shared, block_m=16)
        return ffn.layer(x_TD, built.layer(0), units)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = step()
    ids_T1K.copy_(inputs.ids_TK[:, None])
    graph.replay()
    return out_TD.cpu(), inputs.answer()


def run(case: Case, device: torch.device, seed: int) -> dict[str, object]:
    inputs = Inputs(case, device, torch.Generator().manual_seed(seed))
    started_s = time.perf_counter()
    runners = {"layer": run_layer, "pairs": run_pairs, "segments": run_segments, "tune": run_tune, "graph": run_graph}
    runners["bad ids"] = run_bad_ids
    got, wanted = runners.get(case.by, run_absent)(case, inputs)
    error = (got.double() - wanted).abs().max().item() if got.numel() else 0.0
    # A NaN must not compare as small.
    relative = error / max(wanted.abs().max().item(), 1.0) if not math.isnan(error) else float("inf")
    seconds = round(time.perf_counter() - started_s, 2)
    return {**asdict(case), "seed": seed, "relative_error": relative, "seconds": seconds}


def main() -> None:
    device = torch.device(sys.argv[1])
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.empty(1).isnan().all(), "buffers must start as NaN"
    assert tuple(triton_ffn.ACTIVATIONS) == expert_ffn.TRITON_ACTIVATIONS, "the entry point promises what there is"
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    for case in cases(device):
        if only in case.name:
            print(json.dumps(run(case, device, int.from_bytes(os.urandom(4), "little"))), flush=True)


if __name__ == "__main__":
    main()
