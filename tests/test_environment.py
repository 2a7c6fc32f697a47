"""What tests rely on is set by themselves, not by whoever starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_pytest_by_hand_computes_with_one_thread():
    """`make test` exports the same; two runs of one tuning differed by 9e-4 without."""
    show = "import tests.conftest, os, torch; print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])"
    bare = {n: v for n, v in os.environ.items() if not n.startswith("OMP_")} | {"OMP_NUM_THREADS": "2"}
    command, env = [sys.executable, "-c", show], bare | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, timeout=120, check=True)
    assert found.stdout.split() == [b"1", b"1"]
