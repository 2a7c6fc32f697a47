"""Where a decode step's time goes, by kind of operation, and what the paths of a queued request hold.

    python -m benchmarks.step_breakdown --model ROUTED_CHECKPOINT

One thread, one host in the engine's process. Contenders, in turn: experts in fp32 (`grouped`) and what "auto" takes.
Operations are timed by torch's profiler, which costs about a tenth
itself; what it does not see is Python.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.contenders import local_engine
from benchmarks.surroundings import ROOT, surroundings
from pregate.kernels import step
from pregate.kernels.step import StepKernels, step_kernels
from pregate.model.packed_paths import PackedPaths
from pregate.model.paths import Paths
from pregate.router.engine.engine import Engine
from pregate.router.link.messages import SamplingParams, SubmitRequest

FP16_PRODUCT = "aten::fbgemm_linear_fp16_weight_fp32_activation"
KINDS = {
    "products": ("aten::mm", "aten::_grouped_mm", "mkldnn::_linear_pointwise", "aten::linear", FP16_PRODUCT),
    "attention": ("attend", "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::scaled_dot_product_attention"),
    "rotation and cache": ("place",),
    "norms": ("rms_norm", "add_rms_norm"),
}
CONTEXT, STEPS, ROUNDS = 128, 8, 5


def begin(engine: Engine, batch: int) -> None:
    """Bring `batch` sequences to where all of them decode."""
    prefill = batch * CONTEXT // engine.options.step_tokens + 2
    sampling = SamplingParams(prefill + STEPS + 2, 0.0, ignore_eos=True)
    for number in range(batch):
        prompt = tuple(int(i) for i in np.random.default_rng(number).integers(0, 1000, CONTEXT))
        engine.submit(SubmitRequest(str(number), prompt, sampling, None))
    for _ in range(prefill):
        engine.step()


def steps(engine: Engine) -> list[float]:
    """Seconds of each of `STEPS` steps."""
    taken = []
    for _ in range(STEPS):
        start_s = time.perf_counter()
        engine.step()
        taken.append(time.perf_counter() - start_s)
    return taken


def end(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def decode(engine: Engine, batch: int) -> list[float]:
    begin(engine, batch)
    taken = steps(engine)
    end(engine)
    return taken


def show_kernels() -> None:
    """Let torch's profiler see the CPU's kernels, of engines that are built from now on."""
    kernels = step_kernels("cpu", torch.float32)
    assert kernels is not None
    shown = {part.name: record_function(part.name)(getattr(kernels, part.name)) for part in fields(kernels)}
    step.step_kernels = lambda *_: StepKernels(**shown)


def breakdown(engine: Engine, batch: int) -> dict[str, float]:
    """Shares of a step by kind of operation."""
    begin(engine, batch)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        taken = steps(engine)
    end(engine)
    kinds = dict.fromkeys([*KINDS, "other operations"], 0.0)
    for event in found.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key in names), "other operations")
        kinds[kind] += event.self_cpu_time_total * 1e-6 / sum(taken)
    return {kind: round(value, 3) for kind, value in kinds.items()} | {"Python": round(1 - sum(kinds.values()), 3)}


def path_bytes() -> dict[str, int]:
    """Bytes of a queued request's paths at L = 32, R = 64, k = 8 and a context of 32,768."""
    ids = np.random.default_rng(0).integers(0, 64, (32768, 32, 8)).astype(np.int16)
    return {"as int16": ids.nbytes, "packed": PackedPaths.of(Paths(ids, None, True), 63).nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    args = parser.parse_args()
    engines = {"grouped": local_engine(str(args.model), "grouped"), "auto": local_engine(str(args.model))}
    step_ms: dict[str, Any] = {}
    for batch in args.batches:
        taken = {name: [] for name in engines}
        for _ in range(ROUNDS):
            for name, engine in engines.items():
                taken[name] += decode(engine, batch)
        step_ms[str(batch)] = {name: round(median(times) * 1e3, 1) for name, times in taken.items()}
        print(f"batch {batch}: {step_ms[str(batch)]} ms", flush=True)
    show_kernels()
    engines = {"grouped": local_engine(str(args.model), "grouped"), "auto": local_engine(str(args.model))}
    kinds = {str(batch): {n: breakdown(e, batch) for n, e in engines.items()} for batch in args.batches}
    results = {"step_ms": step_ms, "share_of_step": kinds, "path_bytes": path_bytes()}
    results |= surroundings("step_breakdown", ("transformers",))
    (ROOT / "benchmarks" / "results" / "step_breakdown.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
