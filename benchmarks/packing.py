"""What it takes to load a unit into the ways that a CPU's kernels hold it, and what its products then take.

    python -m benchmarks.packing

Milliseconds, the least of thirty: the check whether fp16 holds a matrix, packing it for FBGEMM and for oneDNN, a plain
copy; products of 1, 4 and 16 rows with each, and of a whole unit in bfloat16 as it is stored. Both matrices of a unit,
one after the other; all of it comes from the processor's caches where it fits them. One thread. Prints a line for each
shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from pregate.kernels.cpu.packed import Product, fits_fp16, fp16_product, onednn_product
from pregate.kernels.cpu.sixteen_bits import run_experts

#: SmolLM2 cut into seven and a shared expert, and a model of 1B into eight: gate and up [2M, D], down [D, M].
SHAPES = (((438, 576), (576, 219)), ((1376, 2048), (2048, 688)))
ROWS = (1, 4, 16)


def least_ms(run: Callable[[], object]) -> float:
    """The least time of thirty calls."""
    times = []
    for _ in range(30):
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return min(times) * 1e3


def plain_product(weight_NK: torch.Tensor) -> Product:
    return lambda x_TK: torch.mm(x_TK, weight_NK.t())


@torch.inference_mode()
def measure(shapes: tuple[tuple[int, int], ...]) -> dict[str, float]:
    """Milliseconds by what was done, of all matrices of a unit."""
    found: dict[str, float] = {}
    for shape in shapes:
        weight = torch.randn(shape).half().float()  # such as fp16 holds
        slot = torch.empty(shape)
        works: dict[str, Callable[[], object]] = {
            "check fp16": partial(fits_fp16, weight),
            "pack FBGEMM": partial(fp16_product, weight),
            "pack oneDNN": partial(onednn_product, weight),
            "copy": partial(slot.copy_, weight),
        }
        for name, make in (("FBGEMM", fp16_product), ("oneDNN", onednn_product), ("plain", plain_product)):
            product = make(weight)
            for num in ROWS:
                works[f"{name} {num}"] = partial(product, torch.randn(num, shape[1]))
        for name, work in works.items():
            found[name] = found.get(name, 0.0) + least_ms(work)
    gate_up, down = (torch.randn(1, *shape).bfloat16() for shape in shapes)
    for num in ROWS:
        unit = partial(run_experts, torch.randn(num, gate_up.shape[2]), [0], [num], gate_up, down)
        found[f"stored {num}"] = least_ms(unit)
    return found


def main() -> None:
    torch.set_num_threads(1)
    for shapes in SHAPES:
        said = ", ".join(f"{name} {ms:.3f}" for name, ms in measure(shapes).items())
        print(" and ".join(f"{n} x {k}" for n, k in shapes), said, sep=": ")


if __name__ == "__main__":
    main()
