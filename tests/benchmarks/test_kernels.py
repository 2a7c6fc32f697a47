"""The kernel benchmark: it goes on where it was cut off, and says in a sentence when there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernel_report import SAME, Report

ROOT = Path(__file__).resolve().parents[2]


def around(**changed):
    said = {name: f"this {name}" for name in SAME}
    first = {
        "command": "first",
        "date": "today",
        "load_average": 0.5,
        "ceilings": {"copy_gbyte_s": 1.0},
        "left_out": [],
    }
    return {**said, **first, **changed}


def cell(tokens: int) -> dict:
    return {"shape": "quartet", "tokens": tokens, "percent": 25, "routing": "uniform", "ms": {"pregate": 1.0}}


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    path = tmp_path / "kernels.json"
    cut = Report(path, around())
    cut.add(cell(16), 2.0)
    cut.add(cell(4), 3.4)
    resumed = Report(path, around(command="second", date="tomorrow", ceilings={"copy_gbyte_s": 2.0}))
    resumed.resume()
    assert ("quartet", 4, 25, "uniform") in resumed and ("quartet", 8, 25, "uniform") not in resumed
    resumed.add(cell(8), 5.0)
    whole = json.loads(path.read_text())
    assert [found["tokens"] for found in whole["cells"]] == [4, 8, 16]
    assert (whole["seconds"], whole["command"], whole["resumed"]) == (8, "first", "tomorrow")
    assert whole["ceilings"] == {"copy_gbyte_s": 1.0}, "shares of one table are of one measurement"


def test_what_was_not_measured_is_said(tmp_path):
    """Also that there was no GPU, and how to measure on one."""
    around = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text())
    cells = [c for c in around.pop("cells") if c["tokens"] in (1, 4) and (c["tokens"], c["routing"]) != (4, "zipf")]
    report = Report(tmp_path / "kernels.json", {**around, "left_out": ["1b at 4096 tokens"]})
    for found in cells:
        report.add(found, 1.0)
    report.finish(1.0)
    page = (tmp_path / "kernels.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| 1b | 4 |"))
    assert row.split(" | ")[3] == "not measured" and page.count("not measured") == 3
    assert "Left out by --max-gflop: 1b at 4096 tokens." in page
    assert "Not measured: no CUDA device" in page and "python -m benchmarks.kernels --device cuda" in page
    assert (tmp_path / "kernels.svg").read_text().startswith("<svg")


def test_cells_of_another_machine_are_not_taken_over(tmp_path):
    path = tmp_path / "kernels.json"
    with pytest.raises(SystemExit, match="is no file of results"):
        Report(path, around()).resume()
    Report(path, around()).add(cell(4), 1.0)
    with pytest.raises(SystemExit, match="hardware was this hardware and is that; measure anew"):
        Report(path, around(hardware="that")).resume()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_its_command_says_so():
    command = [sys.executable, "-m", "benchmarks.kernels", "--device", "cuda", "--dtype", "bfloat16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "--device cuda: torch finds no CUDA device; allowed here: cpu" in done.stderr
    assert "Traceback" not in done.stderr
