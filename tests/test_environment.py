"""What tests rely on is set by themselves, not by whoever starts them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_pytest_by_hand_computes_with_one_thread():
    """`make test` exports the same; two runs of one tuning differed by 9e-4 without."""
    show = "import tests.conftest, os, torch; print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])"
    bare = {n: v for n, v in os.environ.items() if not n.startswith("OMP_")} | {"OMP_NUM_THREADS": "2"}
    command, env = [sys.executable, "-c", show], bare | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, timeout=120, check=True)
    assert found.stdout.split() == [b"1", b"1"]


def test_in_the_background_of_a_script_ctrl_c_still_counts():
    """Chat and `serve run` did not stop when `make test` was started there."""
    show = "import tests.conftest, signal; print(signal.getsignal(signal.SIGINT).__name__)"
    in_background = ["sh", "-c", f"{shlex.quote(sys.executable)} -c {shlex.quote(show)} & wait"]
    found = subprocess.run(in_background, cwd=ROOT, capture_output=True, timeout=120, check=True)
    assert found.stdout.split() == [b"default_int_handler"]


@pytest.mark.skipif(find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_a_file_stays_in_one_process_and_slow_ones_start_first(tmp_path):
    (said := tmp_path / "said").touch()
    body = f"""
import os, time, pytest
@pytest.mark.parametrize("number", range(4))
@pytest.mark.MARK
def test(number):
    time.sleep(0.1)
    with open({str(said)!r}, "a") as file:
        print(__name__, os.environ["PYTEST_XDIST_WORKER"], file=file)
"""
    for name, mark in {"a": "quick", "b": "quick", "c": "slow"}.items():
        (tmp_path / f"test_{name}.py").write_text(body.replace("MARK", mark))
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "tests.sharing_out", "-p", "no:cacheprovider", tmp_path]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120, check=True)
    lines = said.read_text().splitlines()
    assert len(lines) == 12
    assert len(set(lines)) == 3, lines
    assert any(line.startswith("test_c") for line in lines[:2])
