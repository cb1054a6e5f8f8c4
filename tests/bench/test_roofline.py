"""The work of a run, counted on graphs whose work is known; and shares of limits that are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from medcompile.bench import roofline
from medcompile.bench.peer import TEXT, Cell, Job
from medcompile.bench.results import Bench, Entry, Limits, Shape, Timing, Work
from tests import tiny
from tests.tiny import Workshop

LIMITS = Limits(memory_gbs=10.0, cache_mb=1.0, gops={"float32": 100.0, "bfloat16": 200.0, "int8": 400.0})


def test_the_work_of_an_encoder_is_what_its_shapes_say(small: Workshop) -> None:
    cells = (Cell(2, 16), Cell(4, 8))
    found, why = roofline.work(Job("bert", "embed", bundle=str(small.bundle), cells=cells))
    assert why == ""
    hidden, inner = tiny.HIDDEN, 64
    weights = tiny.LAYERS * (4 * hidden * hidden + 2 * hidden * inner)
    for work, cell in zip(found, cells, strict=True):
        tokens = cell.batch * cell.sequence
        assert work.weights == weights
        assert work.linear_ops == 2 * tokens * weights
        assert work.attention_ops == tiny.LAYERS * 4 * tokens * cell.sequence * hidden


def test_an_image_towers_patches_count(pair: Workshop) -> None:
    (one, four), _ = roofline.work(Job("clip", "image", bundle=str(pair.bundle), cells=(Cell(1), Cell(4))))
    assert one.linear_ops > 2 * one.weights
    assert four.linear_ops == pytest.approx(4 * one.linear_ops)
    assert four.weights == one.weights


def test_without_a_bundle_or_with_texts_in_there_is_a_reason_instead(tmp_path: Path) -> None:
    assert roofline.work(Job("bert", "embed")) == ((), "there is no bundle, whose graph tells the operations")
    assert roofline.work(Job("bert", "embed", clock=TEXT))[0] == ()


def bench(work: Work, entry: Entry) -> Bench:
    shapes = (Shape(work.cell, 1, 8, 0, 1),)
    made = Bench("x", "bert", "embed", "model", 1, (0,), 6, 0, "", {}, "", {}, (entry,), shapes)
    return replace(made, limits=LIMITS, work=(work,))


@pytest.mark.parametrize(
    ("work", "precision", "limit_ms", "bound"),
    [
        (Work("1x8", "run", 4e8, 0, 1e6), "int8", 1.0, "arithmetic"),
        (Work("1x8", "run", 4e8, 0, 1e6), "float32", 4.0, "arithmetic"),
        (Work("1x8", "run", 4e8, 0, 20e6), "int8", 2.0, "memory"),
        (Work("1x8", "run", 4e8, 1e8, 2e5), "int8", 2.0, "arithmetic"),  # attention is in float32 here
        (Work("1x8", "run", 4e6, 0, 40e6), "int4", 2.0, "memory"),
    ],
)
def test_the_limit_is_the_slower_of_reading_and_multiplying(
    work: Work, precision: str, limit_ms: float, bound: str
) -> None:
    timing = Timing("1x8", (8.0,), 1, 8.0)
    entry = Entry("e", "e", "e", precision=precision, float_precision="float32", cells=(timing,))
    (share,) = roofline.shares(bench(work, entry), entry, timing)
    assert share.limit_ms == pytest.approx(limit_ms)
    assert share.share == pytest.approx(limit_ms / 8)
    assert share.bound == bound


def test_weights_that_fit_in_the_cache_are_not_read_from_memory() -> None:
    timing = Timing("1x8", (8.0,), 1, 8.0)
    entry = Entry("e", "e", "e", precision="int8", cells=(timing,))
    (share,) = roofline.shares(bench(Work("1x8", "run", 4e5, 0, 0.9e6), entry), entry, timing)
    assert share.bound == "arithmetic"


def test_where_a_peak_was_not_measured_nothing_is_told() -> None:
    timing = Timing("1x8", (8.0,), 1, 8.0)
    for other in (Entry("e", "e", "e", precision="ternary"), Entry("e", "e", "e", precision="int8", device="cuda")):
        assert roofline.shares(bench(Work("1x8", "run", 4e8, 0, 1e6), other), other, timing) == []


def test_a_decoder_is_judged_by_its_first_token_and_by_its_later_ones() -> None:
    first, step = Work("1x8", "first", 4e8, 0, 1e6), Work("1x8", "step", 4e6, 0, 40e6)
    timing = Timing("1x8", (100.0,), 1, 100.0, first=(2.0,), step=(8.0,))
    entry = Entry("e", "e", "e", precision="int8", cells=(timing,))
    shown = roofline.shares(replace(bench(first, entry), work=(first, step)), entry, timing)
    assert [(s.phase, s.bound, round(s.share, 2)) for s in shown] == [
        ("first", "arithmetic", 0.5),
        ("step", "memory", 0.5),
    ]
