import math
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delvm.evaluate.charts import (
    HEIGHT,
    WIDTH,
    Line,
    chart,
    finite,
    log_ticks,
    mean_curve,
    short,
    smooth,
    thinned,
    ticks,
    window,
)


def _elements(svg, tag):
    """The attributes of every element of that kind, and its text."""
    found = []
    for attributes, text in re.findall(rf"<{tag}\b([^>]*?)/?>([^<]*)", svg):
        found.append(dict(re.findall(r'([\w-]+)="([^"]*)"', attributes)) | {"": text})
    return found


def _points(line):
    return [tuple(map(float, point.split(","))) for point in line["points"].split()]


def test_coordinates_agree_with_the_axes():
    falling = [(step, 6 - step / 25) for step in range(0, 101, 10)]  # from 6 to 2
    svg = chart([Line("student", "student", falling)], "step")
    (line,) = _elements(svg, "polyline")
    assert line["data-line"] == "student"
    assert line["class"] == "smooth student"
    texts = {text[""]: text for text in _elements(svg, "text")}
    (x0, y0), (x1, y1) = _points(line)[0], _points(line)[-1]
    assert (x0, x1) == (float(texts["0"]["x"]), float(texts["100"]["x"]))
    assert (y0, y1) == (float(texts["6"]["y"]), float(texts["2"]["y"]))
    assert texts["step"]["text-anchor"] == "middle"


def test_a_logarithmic_axis_puts_equal_factors_at_equal_distances():
    svg = chart([Line("a", "c0", [(10, 1.0), (100, 2.0), (1000, 3.0)], dots=True)], "n", log_x=True)
    places = [float(dot["cx"]) for dot in _elements(svg, "circle")]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    labels = [text[""] for text in _elements(svg, "text")]
    assert {"10", "100", "1,000"} <= set(labels)


def test_thin_lines_and_ranges_stand_behind_and_count_for_the_axes():
    line = Line("a", "c0", [(0, 2.0), (10, 2.0)], [[(0, 1.0), (10, 1.0)]], [(10, 0.5, 4.0)])
    svg = chart([line], "step", "loss", title="<loss>")
    assert 'aria-label="&lt;loss&gt;"' in svg
    thin, thick = _elements(svg, "polyline")
    assert (thin["class"], thick["class"]) == ("raw c0", "smooth c0")
    texts = {text[""]: float(text["y"]) for text in _elements(svg, "text") if "dy" in text}
    (bar,) = [each for each in _elements(svg, "line") if each["class"] == "range c0"]
    assert texts["0"] > float(bar["y1"]) > texts["1"]  # 0.5, down is more
    assert float(bar["y2"]) == texts["4"]
    assert _points(thin)[0][1] == texts["1"]


def test_everything_stays_in_the_view_box():
    curves = [[(10 * i + 10, 2.9 + math.cos(7 * i) + 9 / (i + 1)) for i in range(40)] for _ in range(2)]
    svg = chart([Line("a", "g0", curves[0], curves)], "step", from_zero=True)
    assert f'viewBox="0 0 {WIDTH} {HEIGHT}"' in svg
    for line in _elements(svg, "polyline"):
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in _points(line))
        assert all(a[0] < b[0] for a, b in pairwise(_points(line)))
    for text in _elements(svg, "text"):
        assert 0 <= float(text["x"]) <= WIDTH
        assert 0 <= float(text["y"]) <= HEIGHT


def test_odd_lines_do_not_break_a_chart():
    lines = [
        Line("a", "g0", []),
        Line("b", "g1", [(0, 1.0)]),
        Line("c", "g2", [(1, math.nan), (2, math.inf)]),
        Line("<d>", "g3", [(5, 2.0), (9, 2.0)]),
    ]
    assert [line["data-line"] for line in _elements(chart(lines, "step"), "polyline")] == ["b", "&lt;d&gt;"]
    assert chart(lines[:1], "step") == chart([], "step") == ""


def test_long_curves_are_thinned_but_end_where_they_end():
    curve = [(step, 1 / (step + 1)) for step in range(50_001)]
    kept = thinned(curve)
    assert len(kept) <= 401
    assert (kept[0], kept[-1]) == (curve[0], curve[-1])
    assert thinned(curve[:7]) == curve[:7]


def test_smoothing_by_hand():
    points = [(i, float(v)) for i, v in enumerate([1, 2, 6, 3, 8])]
    assert np.array(smooth(points, 1)) == pytest.approx(np.array(points))
    assert [value for _, value in smooth(points, 3)] == pytest.approx([1.5, 3, 11 / 3, 17 / 3, 5.5])
    straight = [(i, 2.0 * i) for i in range(20)]
    assert np.array(smooth(straight, 7)[3:-3]) == pytest.approx(np.array(straight[3:-3]))  # no lag


def test_the_window_is_odd_and_follows_the_longest():
    assert [window([[(0, 0.0)] * size]) for size in (0, 10, 50, 75, 100, 1000)] == [1, 1, 3, 3, 5, 41]
    assert window([]) == 1


def test_the_mean_is_of_the_steps_that_all_have():
    assert mean_curve([[(10, 1.0), (20, 2.0), (30, 9.0)], [(10, 3.0), (20, 5.0)]]) == [(10, 2.0), (20, 3.5)]


def test_finite_leaves_the_numbers():
    assert finite([(1, 2.0), (2, math.nan), (3, math.inf)]) == [(1, 2.0)]


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_enclose_the_range(low, span):
    found = ticks(low, low + span)
    slack = 1e-6 * max(abs(low), abs(low + span), 1e-3)
    assert found[0] <= low + slack
    assert found[-1] >= low + span - slack
    assert 2 <= len(found) <= 8
    assert all(a < b for a, b in pairwise(found))


def test_ticks_by_hand():
    assert ticks(0, 250) == [0, 50, 100, 150, 200, 250]
    assert ticks(2.85, 5.5) == [2, 3, 4, 5, 6]
    assert ticks(3, 3.02) == pytest.approx([3, 3.005, 3.01, 3.015, 3.02])


@given(st.floats(1e-3, 1e9), st.floats(1, 1e6))
def test_logarithmic_ticks_enclose_the_range(low, factor):
    found = log_ticks(low, low * factor)
    assert found[0] <= low * (1 + 1e-6)
    assert found[-1] >= low * factor * (1 - 1e-6)
    assert len(found) >= 2
    assert all(a < b for a, b in pairwise(found))


def test_logarithmic_ticks_by_hand():
    assert log_ticks(50, 850) == pytest.approx([50, 100, 200, 500, 1000])
    assert log_ticks(1, 1) == pytest.approx([1, 2])
    assert log_ticks(8e5, 7e9) == pytest.approx([1e5, 1e6, 1e7, 1e8, 1e9, 1e10])


def test_large_numbers_are_short():
    assert [short(value) for value in (50, 12_000, 0.5, 790_000, 1_820_736, 1.15e9)] == [
        "50", "12,000", "0.5", "790K", "1.821M", "1.15B",
    ]  # fmt: skip
