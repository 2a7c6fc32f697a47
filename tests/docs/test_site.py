"""The pages as `make docs` builds them."""

import re
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT

pytest.importorskip("mkdocs")


@pytest.mark.slow
def test_the_site_builds_and_asks_nobody_else(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    assert {"index.html", "concepts.html", "api.html", "operate.html", "peers.html"} <= pages.keys()
    for name, text in pages.items():
        fetched = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?://[^\"> ]+)", text)
        assert not fetched, (name, fetched)
    assert "pregate_time_to_first_token_seconds" in pages["operate.html"]
    assert "--resident-experts" in pages["api.html"]
    assert "<!-- " not in pages["operate.html"]
