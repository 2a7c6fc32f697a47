"""What a layer of narrow experts costs expert by expert, and as one masked FFN (`WholeLayer`), by rows and share.

    python -m benchmarks.whole_layers

SmolLM2's shape: 8 experts of 192 neurons over 576, fp32, one thread; medians over the layers of one pass, in turn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch

from benchmarks.surroundings import ROOT, surroundings
from pregate.kernels.contract import ExpertFFN
from pregate.kernels.cpu.ffn import GroupedFFN
from pregate.kernels.cpu.packed import PackedFFN
from pregate.kernels.cpu.whole import WholeLayer, absent

HIDDEN, WIDTH, UNITS, LAYERS, PASSES = 576, 192, 8, 12, 9
SHARES = ((3, 3), (2, 2), (1, 1))
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)


def one_by_one(ffn: ExpertFFN, x_TD: torch.Tensor, ids_TLK: torch.Tensor, shared: int, units: list) -> None:
    segments = ffn.segments(ids_TLK, UNITS - shared, shared)
    for layer, part in enumerate(units):
        ffn.layer(x_TD, segments.layer(layer), part)


def whole(x_TD: torch.Tensor, ids_TLK: torch.Tensor, shared: int, layers: list[WholeLayer]) -> None:
    absent_LTR = absent(ids_TLK.numpy(), UNITS - shared)
    for layer, part in enumerate(layers):
        part.run(x_TD, absent_LTR[layer], None)


def seconds(call: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


@torch.inference_mode()
def measure(shared: int, active: int) -> list[dict]:
    """Milliseconds of one layer by rows, for either way."""
    routed = UNITS - shared
    weights = [
        (
            (torch.randn(2 * shared * WIDTH, HIDDEN) / 24, torch.randn(HIDDEN, shared * WIDTH) / 24),
            (torch.randn(routed, 2 * WIDTH, HIDDEN) / 24, torch.randn(routed, HIDDEN, WIDTH) / 24),
        )
        for _ in range(LAYERS)
    ]
    ffns: list[ExpertFFN] = [GroupedFFN("silu"), PackedFFN("silu")]
    held = {ffn.name: [ffn.units(pair, shared, *stack) for pair, stack in weights] for ffn in ffns}
    layers = [WholeLayer("silu", pair, stack, torch.float32) for pair, stack in weights]
    rows = []
    for num_rows in ROWS:
        x_TD = torch.randn(num_rows, HIDDEN)
        picks = [np.sort(np.random.permutation(routed)[:active]) for _ in range(num_rows * LAYERS)]
        ids_TLK = torch.from_numpy(np.stack(picks).reshape(num_rows, LAYERS, active))
        calls = {ffn.name: partial(one_by_one, ffn, x_TD, ids_TLK, shared, held[ffn.name]) for ffn in ffns}
        calls["whole"] = partial(whole, x_TD, ids_TLK, shared, layers)
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(PASSES):
            for name, call in calls.items():
                taken[name].append(seconds(call))
        rows.append({"rows": num_rows} | {name: round(1e3 * median(t) / LAYERS, 3) for name, t in taken.items()})
        print(f"{shared} shared, {active} of {routed} active: {rows[-1]} ms", flush=True)
    return rows


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    np.random.seed(0)
    found = {f"{100 * (shared + active) // UNITS}": measure(shared, active) for shared, active in SHARES}
    out = ROOT / "benchmarks" / "results" / "whole_layers.json"
    out.write_text(json.dumps({"ms_per_layer": found} | surroundings("whole_layers", ()), indent=1) + "\n")


if __name__ == "__main__":
    main()
