"""Charts: labels that do not collide, notes at the marks, the page's colours, user's words as words."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest

from pregate.convert.report.charts import COLOURS, agreement_chart, quality_chart, spread, training_chart
from pregate.convert.report.figures import Figures
from pregate.convert.report.page import render
from pregate.convert.report.training import TrainingCurve
from pregate.convert.report.words import even_shade

HOSTILE = '</svg><script>1</script>&"$x_1$\x00'


def test_labels_are_moved_apart_and_kept_inside():
    assert spread([10, 11, 50], 5, 100) == [8.0, 13.0, 50.0]
    assert spread([98, 99], 5, 100) == [95, 100]
    assert spread([1, 1, 1], 5, 100) == [0, 5, 10]
    assert spread([], 5, 100) == []
    crowded = spread([3.0 * i for i in range(20)], 5, 100)
    assert all(b - a >= 5 - 1e-9 for a, b in pairwise(crowded))


def test_shades():
    assert [even_shade(v, 0.2) for v in (0.3, 0.01, 0, 0.2, 0.4)] == ["p2", "n2", "n3", "z", "p3"]
    assert even_shade(0, 0) == "z"


def test_marks_tell_their_numbers():
    curve = TrainingCurve("loss", (1, 2, 3), (3.0, 2.5, 2.25))
    svg = training_chart(curve)
    assert re.findall(r"<title>(.*?)</title>", svg) == ["step 1: 3.000", "step 2: 2.500", "step 3: 2.250"]
    places = [float(y) for y in re.findall(r'<title>.*?</title><use [^>]*y="([\d.]+)"', svg)]
    assert (places[1] - places[0]) / (places[2] - places[1]) == pytest.approx(2, rel=1e-3)


def test_every_way_to_run_the_model_is_in_the_picture(exact: tuple[Figures, str]):
    figures = exact[0]
    svg = quality_chart(figures, 880)
    notes = re.findall(r"<title>(.*?)</title>", svg)
    quality = figures.quality
    assert len(notes) == len(quality.controls) + len(quality.others) + sum(len(c.perplexities) for c in quality.curves)
    own = quality.own_point
    assert f"path router: {100 * own.active_share:.1f} % of the FFN, perplexity {own.perplexity:.1f}" in notes
    layers = re.findall(r"<title>layer (\d), path and oracle: ([\d.]+) % of picks", agreement_chart(figures, 880))
    pairs = [(a.layer, a.mean_overlap) for a in figures.agreements if (a.first, a.second) == ("path", "oracle")]
    assert [(int(layer), float(share)) for layer, share in layers] == [(n, round(100 * v, 1)) for n, v in pairs]


def test_colours_are_the_pages_and_no_other(exact: tuple[Figures, str]):
    for svg in (quality_chart(exact[0], 880), quality_chart(exact[0], 350), agreement_chart(exact[0], 880)):
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg.replace("href", ""))) == set()
        used = set(re.findall(r"var\(--(\w+)\)", svg))
        assert {"ink", "soft", "rule", "c0"} <= used <= set(COLOURS)
        assert "font-family" not in svg


def test_words_in_a_picture_are_words(exact: tuple[Figures, str]):
    quality = exact[0].quality
    hostile = replace(exact[0], quality=replace(quality, others=(replace(quality.others[0], name=HOSTILE),)))
    svg = quality_chart(hostile, 880)
    assert "<script" not in svg
    assert svg.count("</svg>") == 1
    assert "&lt;/svg&gt;&lt;script&gt;1&lt;/s" in svg
    short = replace(exact[0], quality=replace(quality, others=(replace(quality.others[0], name="a$x_1$&\x07b"),)))
    assert ">a$x_1$&amp;\N{REPLACEMENT CHARACTER}b " in quality_chart(short, 880)


def test_what_is_not_finite_is_left_to_the_table(exact: tuple[Figures, str]):
    quality = exact[0].quality
    endless = replace(quality, others=(replace(quality.others[0], name="endless", perplexity=float("inf")),))
    assert "endless" not in quality_chart(replace(exact[0], quality=endless), 880)
    assert "endless" in render(replace(exact[0], quality=endless))


def test_the_same_figures_give_the_same_bytes(exact: tuple[Figures, str]):
    assert render(exact[0]) == render(exact[0]) == exact[1]
    assert "matplotlib" not in exact[1].lower()
    assert not re.search(r"https?:", exact[1])  # the fixture names none, and the page loads and links nothing
