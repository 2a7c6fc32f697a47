from __future__ import annotations

from itertools import pairwise

import pytest

from pregate.convert.report.matrix import Cell, heat_map, shade
from pregate.convert.report.parts import even_shade
from pregate.convert.report.svg import Bar, Point, Series, bars, chart, linear_axis, log_axis, spread


def test_labels_are_moved_apart_and_kept_inside():
    assert spread([10, 11, 50], 5, 0, 100) == [8.0, 13.0, 50.0]
    assert spread([98, 99], 5, 0, 100) == [95, 100]
    assert spread([1, 1, 1], 5, 0, 100) == [0, 5, 10]
    assert spread([], 5, 0, 100) == []
    crowded = spread([3.0 * i for i in range(20)], 5, 0, 100)
    assert all(b - a >= 5 - 1e-9 for a, b in pairwise(crowded))


def test_axes_end_at_round_numbers():
    axis = linear_axis("x", 0.375, 1.0, str, 5)
    assert axis.ticks == pytest.approx((0.2, 0.4, 0.6, 0.8, 1.0))
    assert (axis.place(axis.low), axis.place(axis.high)) == (0, 1)
    level = linear_axis("x", 3.0, 3.0, str)
    assert level.low <= 3 <= level.high
    assert level.low < level.high
    log = log_axis("y", 4.8, 176, str)
    assert log.ticks == (5, 10, 20, 50, 100)
    assert log.place(10) - log.place(5) == pytest.approx(log.place(20) - log.place(10))


def test_shades():
    assert [shade(v, (1, 2, 5)) for v in (0.5, 3, -6, -1)] == ["z", "p2", "n3", "n1"]
    assert [even_shade(v, 0.2) for v in (0.3, 0.01, 0, 0.2, 0.4)] == ["p2", "n2", "n3", "z", "p3"]
    assert even_shade(0, 0) == "z"


def test_words_in_a_picture_are_escaped():
    hostile = "</svg><script>1</script>"
    series = Series("c0", (Point(0.5, 5, hostile, hostile, hostile),), "solid")
    axis = linear_axis(hostile, 0, 1, lambda _: hostile)
    pictures = [chart(hostile, [series], axis, linear_axis("y", 0, 9, str), 400, 200)]
    pictures.append(bars(hostile, [Bar(hostile, 0.5, hostile, hostile)], 400, 1.0))
    pictures.append(heat_map(hostile, [(hostile, [Cell("z", hostile, hostile)])], 400, hostile, hostile))
    for picture in pictures:
        assert "<script" not in picture
        assert picture.count("</svg>") == 1


def test_small_heat_maps_have_a_tooltip_a_cell_and_large_ones_a_row():
    def draw(num: int) -> str:
        rows = [(str(i), [Cell("p1" if j % 2 else "z", "1", f"note {i},{j}") for j in range(num)]) for i in range(num)]
        return heat_map("loads", rows, 800, "expert", row_notes=[f"row {i}" for i in range(num)])

    assert draw(10).count("note ") == 100
    large = draw(40)
    assert (large.count("note "), large.count(">row ")) == (0, 40)
    assert large.count("<path") == 2  # one for each colour
    assert large.count("M") == 1600


def test_neighbours_of_one_colour_are_one_stroke():
    rows = [("0", [Cell("z", "", "")] * 700)]
    assert "M0 0h700v1h-700z" in heat_map("loads", rows, 800, "expert")
