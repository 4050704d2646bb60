"""Curves: round numbers on the axes, and no point that is none."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree as ET

from hypothesis import assume, given
from hypothesis import strategies as st

from flux2_lora.inference.curves import Line, drawing, figure, smoothed, ticks

FINITE = st.floats(-1e6, 1e6)


@given(FINITE, st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_round_lie_inside_and_are_about_as_many_as_asked_for(low: float, span: float, about: int) -> None:
    found = ticks(low, low + span, about)
    assert all(low - span * 1e-6 <= tick <= low + span * (1 + 1e-6) for tick in found)
    assert about / 2.6 - 1 <= len(found) <= about + 1
    assume(len(found) > 1)
    apart = (found[-1] - found[0]) / (len(found) - 1)
    digits = apart / 10 ** math.floor(math.log10(apart) + 1e-6)
    assert min(abs(digits - round_) for round_ in (1, 2, 5, 10)) < 1e-3


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=200))
def test_a_smoothed_curve_has_a_value_a_step_within_those_that_it_smooths(values: list[float]) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    found = smoothed(points)
    assert [step for step, _ in found] == [step for step, _ in points]
    assert all(min(values) - 1e-6 <= value <= max(values) + 1e-6 for _, value in found)


def heights(drawn: str, style: str) -> list[float]:
    [path] = re.findall(rf'class="{style}" d="(M[^"H]+)"', drawn)
    return [float(place.split()[1]) for place in re.split("[ML]", path) if place]


def test_a_value_that_is_no_number_is_left_out() -> None:
    drawn = figure("t", "n", [Line(name="a", points=[(0, 1.0), (1, math.nan), (2, 2.0)])])
    assert "nan" not in drawn
    assert len(heights(drawn, "line line-0")) == 2
    assert figure("t", "n", [Line(name="a", points=[(0, math.inf)])]) == ""


def test_an_outlier_of_a_faint_line_does_not_flatten_the_others() -> None:
    raw = [(float(step), 1.0 + step / 100) for step in range(100)]
    raw[50] = (50.0, 1000.0)
    drawn = figure("t", "n", [Line(name="raw", points=raw, faint=True), Line(name="a", points=[(0, 1.0), (99, 2.0)])])
    first, last = heights(drawn, "line line-0")
    assert first - last > 100


def test_a_larger_value_stands_higher_and_names_are_escaped() -> None:
    drawn = figure("<t>", "n", [Line(name="<a>", points=[(0, 2.0), (10, 1.0)])], (10, 1.0), "<best>")
    first, last = heights(drawn, "line line-0")
    assert first < last
    assert not re.search("<t>|<a>|<best>", drawn)


def test_charts_in_a_file_of_their_own_are_whole_svg_with_each_line_in_the_plot_and_in_the_legend() -> None:
    lines = [Line(name="a < b", points=[(0, 1.0), (10, 2.0)]), Line(name="c", points=[(0, 3.0), (10, 4.0)])]
    root = ET.fromstring(drawing([("first & last", lines), ("second", lines[:1])]))
    name = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert name >= {"svg", "style", "path", "text"}
    said = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "first & last" in said
    assert "a < b 1.000 → 2.000" in said
    drawn = [path.get("class") for path in root.iter("{http://www.w3.org/2000/svg}path")]
    assert drawn.count("line line-0") == 4
    assert drawn.count("line line-1") == 2
