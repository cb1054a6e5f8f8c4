"""The frame of HTML pages: contrast, escaping, figures as text, tables that a screen reader can follow."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from medcompile import page


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [page.LIGHT, page.DARK], ids=["light", "dark"])
def test_every_colour_of_text_and_marks_has_a_contrast_of_4_5(colours: dict[str, str]) -> None:
    shown = {name: contrast(colour, colours["--paper"]) for name, colour in colours.items()}
    assert {n: c for n, c in shown.items() if c < 4.5 and n not in ("--paper", "--grid")} == {}


def test_light_and_dark_name_the_same_colours() -> None:
    assert list(page.LIGHT) == list(page.DARK)


def test_escape_leaves_no_markup_and_nothing_that_turns_the_line() -> None:
    assert page.escape("<b a='1'>&\"") == "&lt;b a=&#x27;1&#x27;&gt;&amp;&quot;"
    assert page.escape("a\u202eb\x00\ud800\tc") == "a\ufffdb\ufffd\ufffd c"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (0.0, "0"),
        (-0.00512345, "-0.005123"),
        (1234567, "1,234,567"),
        (61234.56, "61,235"),
        (2.3e-13, "2.3e-13"),
        (1e-7, "1e-7"),
        (math.inf, "infinite"),
        (-math.inf, "-infinite"),
        (math.nan, "not a number"),
    ],
)
def test_a_number_is_written_for_readers(value: float | None, text: str) -> None:
    assert page.number(value) == text


def test_a_table_heads_its_columns_and_rows_and_escapes_its_cells() -> None:
    table = ET.fromstring(page.table("A & B", ("name", "<i>"), [("x", "<script>")]))
    assert [(h.get("scope"), h.text) for h in table.iter("th")] == [("col", "name"), ("col", "<i>"), ("row", "x")]
    assert [d.text for d in table.iter("td")] == ["<script>"]
    assert next(table.iter("caption")).text == "A & B"


def test_a_document_forbids_the_browser_every_fetch_and_script() -> None:
    text = page.document("<t>", "<main></main>")
    assert text.startswith("<!DOCTYPE html>")
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in text
    assert "<title>&lt;t&gt;</title>" in text
    assert text == page.document("<t>", "<main></main>")
