"""Every configuration compiles for sm_90 without a GPU: wgmma, no spills, shared memory that fits."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path

import pytest

from pregate.kernels.triton.block_sizes import BlockTable
from tests.kernels.programs import run_program

PROGRAM = Path(__file__).with_name("compile_sm90.py")
#: What one block may have on sm_90: 227 KiB.
MAX_SHARED_BYTES = 227 * 1024
SMALLER_ARCH = 86
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or platform.machine() != "x86_64",
    reason="needs Triton with its own assembler (x86_64)",
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, dict]:
    """All of them, in one process with a cache of its own, so that the compiler does run."""
    cache = str(tmp_path_factory.mktemp("triton"))
    return {line["name"]: line for line in run_program(PROGRAM, interpret=False, TRITON_CACHE_DIR=cache)}


@pytest.mark.slow
def test_every_configuration_of_the_table(kernels):
    tiled = [found for found in kernels.values() if found.get("arch") == 90]
    table = BlockTable.load("")
    for kernel, rows in table.by_rows.items():
        for element in ("bf16", "fp16", "fp32"):
            compiled = {f["block_m"] for f in tiled if (f["kernel"], f["element"]) == (kernel, element)}
            assert compiled == set(rows), (kernel, element)
        if kernel.endswith("gate_up"):
            for block_m in rows:
                of_row = [f for f in tiled if (f["kernel"], f["block_m"]) == (kernel, block_m)]
                assert {f["act"] for f in of_row} == set(ACTIVATIONS)
                assert {f["weighted"] for f in of_row} == {True, False}
    for name, found in kernels.items():
        if found.get("arch") != SMALLER_ARCH:
            assert found["stack_bytes"] == found["local_bytes"] == 0, f"{name} spills: {found}"
            assert found["shared_bytes"] <= MAX_SHARED_BYTES, name
    for found in tiled:
        assert found["wgmma"] or not found["needs_wgmma"], found["name"]
        assert found["bulk_copy"] == found["needs_bulk_copy"], found["name"]
        assert found["element"] == "fp32" or found["shared_bytes"] <= found["estimated_bytes"], found["name"]


@pytest.mark.slow
def test_sizes_cut_for_a_smaller_card_fit_it(kernels):
    cut = [found for found in kernels.values() if found.get("arch") == SMALLER_ARCH]
    assert {found["kernel"] for found in cut} == {"gate_up", "decode_gate_up", "down", "decode_down"}
    for found in cut:
        assert found["shared_bytes"] <= found["estimated_bytes"] <= 99 * 1024, found["name"]
