"""Charts: every one is well-formed, labelled, has its numbers as a table, and survives the numbers that data brings."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcompile import charts
from medcompile.charts import Axis, Bar, Caption, Dot, Limit, Series

CAPTION = Caption("c", 'A <title> & "more"', "What it <shows>.")
PLANTED = "<script>alert(1)</script>\u202e"


def scatter(a: float, b: float, *, log: bool = False) -> str:
    dots = [Dot(a, b, PLANTED, "good"), Dot(b, a, "two", "bad"), Dot(1.0, 2.0, "three", "good")]
    return charts.scatter(CAPTION, dots, Axis("ms", log), Axis("points", log), Limit(a, "limit"))


def lines(a: float, b: float, *, log: bool = False) -> str:
    series = [Series(PLANTED, ((1.0, a), (2.0, b))), Series("two", ((1.0, b),)), Series("none", ())]
    return charts.lines(CAPTION, series, Axis("batch", log), Axis("ms", log), Limit(b, "limit"))


def bars(a: float, b: float, *, log: bool = False) -> str:
    return charts.bars(CAPTION, [Bar(PLANTED, a, None, b), Bar("two", b)], Axis("error", log))


def forest(a: float, b: float, *, log: bool = False) -> str:
    rows = [Bar(PLANTED, a, min(a, b), math.inf, a, "good"), Bar("two", b, -math.inf, b, None, "bad")]
    return charts.forest(CAPTION, rows, Axis("difference", log))


def histogram(a: float, b: float, *, log: bool = False) -> str:
    edges = sorted((a, b, 1.0)) if not math.isnan(a + b) else [0.0, 1.0, 2.0]
    cuts = [Limit(a, PLANTED), Limit(1.0, "above")]
    return charts.histogram(CAPTION, edges, [0, 7], Axis("value"), Axis("count", log), cuts)


def heat(a: float, b: float, *, log: bool = False) -> str:
    return charts.heat(CAPTION, [PLANTED, "two"], ["x", "y", "z"], [[a, b, None], [1.0, a, b]], Axis("error", log))


DRAWING = {"svg", "title", "desc", "g", "path", "rect", "text"}
TABLE = {"table", "caption", "thead", "tbody", "tr", "th", "td"}
CHARTS = [scatter, lines, bars, forest, histogram, heat]
Chart = Callable[..., str]


@pytest.mark.parametrize("chart", CHARTS)
def test_a_chart_is_named_described_and_has_its_numbers_as_a_table(chart: Chart) -> None:
    figure = ET.fromstring(chart(0.5, 3.0))
    (svg,) = figure.iter("svg")
    names = (svg.get("aria-labelledby") or "").split()
    found = {e.get("id"): e.text for e in svg.iter()}
    assert svg.get("role") == "img"
    assert [found[name] for name in names] == [CAPTION.title, CAPTION.text]
    (details,) = figure.iter("details")
    assert all(h.get("scope") in ("col", "row") for h in details.iter("th"))
    assert "3" in " ".join(cell.text or "" for row in details.iter("tr") for cell in row).split()


@pytest.mark.parametrize("chart", CHARTS)
def test_a_chart_holds_no_script_no_reference_and_no_markup_of_its_labels(chart: Chart) -> None:
    text = chart(0.5, 3.0)
    tags = {e.tag for e in ET.fromstring(text).iter()}
    assert tags <= DRAWING | {"figure", "figcaption", "strong", "div", "details", "summary"} | TABLE
    assert "\u202e" not in text
    assert not re.search(r"href|src=|url\(|\bon\w+=", text.replace("&lt;script&gt;", ""))


@pytest.mark.parametrize("chart", CHARTS)
def test_a_chart_has_the_same_bytes_twice(chart: Chart) -> None:
    assert chart(0.5, 3.0) == chart(0.5, 3.0)


@pytest.mark.parametrize("chart", CHARTS)
@settings(max_examples=60, deadline=None)
@given(a=st.floats(), b=st.floats(), log=st.booleans())
def test_a_chart_is_well_formed_whatever_the_numbers_are(chart: Chart, a: float, b: float, log: bool) -> None:
    text = chart(a, b, log=log)
    for drawn in ET.fromstring(text).iter("svg"):
        placed = " ".join(
            v for e in drawn.iter() for k, v in e.attrib.items() if k in ("d", "x", "y", "width", "height")
        )
        assert not re.search("nan|inf|e[+-]", placed)


def test_kinds_differ_in_shape_and_lines_in_dash_not_in_colour_alone() -> None:
    markers = re.findall(r'<path class="m\d( open)?" d="M[\d.]+ [\d.]+(m[^"]+)"', charts.lines(
        CAPTION, [Series(str(k), ((1.0, float(k)),)) for k in range(8)], Axis("x"), Axis("y")))  # fmt: skip
    assert len(set(markers)) == 8
    dashes = re.findall(r"stroke-dasharray:([^}]+)\}", charts.STYLE)
    assert len(set(dashes[:-1])) == len(dashes[:-1])


def test_labels_that_would_lie_on_one_another_are_left_to_the_table() -> None:
    crowd = [Dot(1.0 + k * 1e-6, 1.0, f"the artifact with number {k}") for k in range(30)]
    drawn = charts.scatter(CAPTION, [Dot(0.0, 0.0, "alone"), *crowd], Axis("x"), Axis("y"))
    svg, _, rest = drawn.partition("<details>")
    labels = re.findall(r"<text x[^>]*>(the artifact[^<]*|alone)<", svg)
    assert "alone" in labels
    assert 1 <= len(labels) < 10
    assert all(f"the artifact with number {k}<" in rest for k in range(30))


def test_a_limit_is_drawn_at_its_value() -> None:
    dots = [Dot(0.0, 0.0, "low"), Dot(1.0, 1.0, "high")]
    svg = ET.fromstring(charts.scatter(CAPTION, dots, Axis("x"), Axis("y"), Limit(1.0, "no more")))
    _, line = [e.get("d", "") for e in svg.iter("path") if e.get("class") == "limit"]  # the first is the legend's
    level = re.fullmatch(r"M\S+ (\S+)H\S+", line)
    assert level
    assert f" {level[1]}m" in " ".join(e.get("d", "") for e in svg.iter("path") if e.get("class") == "m0")


def test_an_empty_chart_is_still_a_chart() -> None:
    axis = Axis("x")
    for drawn in (
        charts.scatter(CAPTION, [], axis, axis),
        charts.lines(CAPTION, [], axis, axis),
        charts.bars(CAPTION, [], axis),
        charts.forest(CAPTION, [], axis),
        charts.heat(CAPTION, [], [], [], axis),
    ):
        assert ET.fromstring(drawn).find(".//svg") is not None
