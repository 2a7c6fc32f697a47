"""The Triton kernels against float64: in the interpreter everywhere, and on the device where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.programs import hindrance, run_program

PROGRAM = Path(__file__).parents[1] / "triton_cases.py"
#: What the product and the stores round to, with room for the order of sums.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
SEGMENT_BUFFERS = "segments"


def run_cases(device: str) -> list[dict]:
    return run_program(PROGRAM, device, interpret=device == "cpu")


def check(results: list[dict]) -> None:
    for case in results:
        print(case["name"], "seed", case["seed"], case["relative_error"])
        assert case["relative_error"] <= TOLERANCE[case["dtype"]] * (case["by"] != SEGMENT_BUFFERS), case


@pytest.mark.slow
@pytest.mark.skipif(bool(hindrance()), reason=hindrance() or "can run")
def test_every_case_in_the_interpreter():
    results = run_cases("cpu")
    check(results)
    for dtype in ("float32", "float16"):
        assert {case["tokens"] for case in results if case["dtype"] == dtype} >= {1, 2, 7, 8, 9, 33, 70}
    assert {case["k"] for case in results if case["routed"] == 4 and case["by"] == "layer"} == {1, 2, 3, 4}
    assert {case["dtype"] for case in results} == {"float32", "float16"}, "the interpreter's bf16 product is wrong"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_case_on_the_device():
    results = run_cases("cuda")
    check(results)
    for dtype in ("float32", "float16", "bfloat16"):
        assert {case["tokens"] for case in results if case["dtype"] == dtype} >= {1, 2, 7, 8, 9, 64, 257}
