"""Every configuration compiles for sm_90 without a GPU: wgmma, no spills, shared memory that fits."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pregate.kernels.block_sizes import BlockTable

PROGRAM = Path(__file__).with_name("compile_sm90.py")
ROOT = Path(__file__).resolve().parents[2]
#: What one block may have on sm_90: 227 KiB.
MAX_SHARED_BYTES = 227 * 1024

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or platform.machine() != "x86_64",
    reason="needs Triton with its own assembler (x86_64)",
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, dict]:
    """All of them, in one process with a cache of its own, so that the compiler does run."""
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return {(line := json.loads(text))["name"]: line for text in done.stdout.splitlines()}


@pytest.mark.slow
def test_every_configuration_of_the_table(kernels):
    table = BlockTable.load("")
    for kernel in ("gate_up", "down"):
        assert {f"{kernel} {block_m} tma" for block_m in table.by_rows[kernel]} <= set(kernels)
    for name, found in kernels.items():
        assert found["wgmma"] or not found["needs_wgmma"], name
        assert found["stack_bytes"] == found["local_bytes"] == 0, f"{name} spills: {found}"
        assert found["shared_bytes"] <= MAX_SHARED_BYTES, name
        assert found["bulk_copy"] == ("tma" in name or name.endswith(("fp32", "atomic"))), name
