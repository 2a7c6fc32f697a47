"""`pregate report` on Read-ME's checkpoints, whose experts hold the same neurons."""

from __future__ import annotations

from pathlib import Path

import pytest

from pregate.convert.domains.run import read_me
from pregate.convert.measure.control_table import DENSE
from pregate.convert.report.figures import Figures
from pregate.convert.report.options import ReportOptions
from pregate.convert.report.run import report
from tests.convert.domains.read_me_cases import load, small
from tests.convert.report.pages import text_of


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def page(request: pytest.FixtureRequest, tiny_dense: Path, domains: tuple[Path, ...], tmp_path_factory):
    """Whether equal rows stayed equal in training, the checkpoint, its figures, and its page."""
    folder = tmp_path_factory.mktemp("overlapping")
    read_me(small(tiny_dense, folder / "cut", domains, tie_overlap=request.param, learning_rate=5e-3))
    figures = report(ReportOptions(folder / "cut", folder / "page.html", (domains[0],), max_tokens=150))
    return request.param, folder / "cut", figures, text_of((folder / "page.html").read_text())


Page = tuple[bool, Path, Figures, str]


def test_lines_end_at_its_own_number_of_experts(page: Page):
    """A token of two experts would add what both hold twice; with all three 150 % of the FFN would run."""
    _, _, figures, html = page
    own, oracle = figures.quality.curves
    assert (own.name, own.num_active, own.active_shares) == ("path router", (0, 1), (0, 0.5))
    assert (oracle.name, oracle.num_active, oracle.active_shares) == ("oracle", (0, 1), (0, 0.5))
    assert own.perplexities == (oracle.perplexities[0], figures.quality.own_point.perplexity)
    assert oracle.perplexities[1] == figures.quality.point("oracle").perplexity
    assert max(p.active_share for p in figures.quality.controls) == figures.quality.point(DENSE).active_share == 1
    assert "The lines end at the checkpoint's own number of experts: its experts overlap" in html
    assert "150 % of the FFN" not in html
    assert "150.0 % of the FFN" not in html


def test_what_a_swap_of_differing_rows_saves_is_said_only_where_they_are_tied(page: Page):
    tied, path, figures, html = page
    assert figures.overlap.overlaps
    assert figures.overlap.tied == tied
    mlps = load(path).routed_mlps
    neurons = sum(len(mlp.neuron_index.unique()) for mlp in mlps)
    assert figures.overlap.rows_per_neuron == pytest.approx(3 * 3 * 64 / neurons)
    saves = f"Experts overlap ({figures.overlap.rows_per_neuron:.2f} rows stored for each neuron)"
    differ = "Experts hold the same neurons, but their weights differ by now, so a swap moves whole experts."
    assert (saves in html, differ in html) == (tied, not tied)
    whole = sum(layer.new_bytes for layer in figures.repeats.layers)
    rows = sum(layer.new_row_bytes for layer in figures.repeats.layers)
    assert 0 < rows < whole
