"""What `make demo` runs, shortened."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.cluster.leftovers import ROOT, files_in, own_environment, processes_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_demo_serves_what_ships_and_holds_it_to_the_reference():
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:  # short: a socket's path has 107 bytes
        command = [sys.executable, ROOT / "examples" / "demo.py", "--quartet", "--max-tokens", "4"]
        environment = own_environment(Path(folder))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Equal to the in-process reference model: 16 tokens" in done.stdout
        assert not processes_of(folder)
        assert files_in(folder) == []
