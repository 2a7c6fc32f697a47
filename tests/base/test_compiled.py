"""Where compiled loops are kept, in processes of their own, and what tells one version from another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pregate.base.compiled import sources

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import numpy as np
from pregate.kernels.cpu.norm import rms_norm
x = np.ones((1, 4), np.float32)
rms_norm(x, x[0], 0.0, x)
assert (x == 1).all()
"""


def start(code: str = CODE, **settings: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | settings)


@pytest.mark.parametrize("num_processes", [3])
def test_processes_that_compile_at_once_share_a_folder(tmp_path: Path, num_processes: int):
    processes = [start(NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(num_processes)]
    assert [p.wait(timeout=300) for p in processes] == [0] * num_processes
    kept = sorted(tmp_path.rglob("*.nbi"))
    assert kept, "nothing was kept"
    assert start(NUMBA_CACHE_DIR=str(tmp_path)).wait(timeout=300) == 0
    assert sorted(tmp_path.rglob("*.nbi")) == kept


def test_without_a_folder_to_write_in_a_process_compiles_for_itself():
    """numba is left no place but NUMBA_CACHE_DIR, which is not given."""
    assert start(NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator", NUMBA_CACHE_DIR="").wait(timeout=300) == 0


def test_what_loops_are_made_of_is_their_file_and_what_it_imports():
    own, vectors = ROOT / "pregate/base/compiled.py", ROOT / "pregate/kernels/cpu/vectors.py"
    attention, planning = ROOT / "pregate/kernels/cpu/attention.py", ROOT / "pregate/router/engine/plan_loops.py"
    assert set(sources(attention)) == {attention, vectors, own}
    assert set(sources(planning)) == {planning, own}


def test_hosts_do_not_load_numba():
    code = "import sys, pregate.workers.host.server, pregate.kernels.step; assert 'numba' not in sys.modules"
    assert start(code).wait(timeout=300) == 0
