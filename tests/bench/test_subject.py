"""What is compared, and with which inputs: from bundles and recipes, for every task and both clocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medcompile.bench import subject, worker
from medcompile.bench.peer import MODEL, TEXT, Cell, Job, calibration_feeds
from medcompile.errors import UsageError
from tests.tiny import Workshop


def prepared(workshop: Workshop, folder: Path, task: str, shapes: str, clock: str = MODEL) -> Job:
    found = subject.of(workshop.bundle, folder)
    job = replace(found.job, task=task, clock=clock, work=str(folder))
    job = replace(job, cells=subject.cells(shapes, task, clock, job.max_length))
    job, told, digest = subject.with_inputs(found, job, folder, allow_phi=False)
    assert told == "40 items of held-out"
    assert len(digest) == 64
    return job


@pytest.mark.parametrize("task", ["embed", "token-classification", "fill-mask"])
def test_arrays_are_full_rows_of_the_datas_own_tokens(workshop: Workshop, tmp_path: Path, task: str) -> None:
    job = prepared(workshop, tmp_path, task, "2x16,1x8")
    batches = worker.read_batches(job, job.cells[0])
    assert len(batches) == subject.ITEMS // 2
    for batch in batches:
        assert batch.feeds["input_ids"].shape == (2, 16)
        assert batch.feeds["attention_mask"].all()
        assert {a.dtype.name for a in batch.feeds.values()} == {"int64"}
        if task == "fill-mask":
            assert batch.feeds["mask_position"].shape == (2,)
            masked = batch.feeds["input_ids"][np.arange(2), batch.feeds["mask_position"]]
            assert len(set(masked.tolist())) == 1
            assert (batch.feeds["mask_position"] > 0).all()
    assert len({b.feeds["input_ids"].tobytes() for b in batches}) > 1


def test_calibration_shares_no_item_with_the_inputs_and_comes_without_padding(
    workshop: Workshop, tmp_path: Path
) -> None:
    job = prepared(workshop, tmp_path, "embed", "1x16")
    rows = calibration_feeds(job)
    assert 40 <= len(rows) <= 48
    lengths = {row["input_ids"].shape[1] for row in rows}
    assert len(lengths) > 1
    assert all(row["attention_mask"].all() for row in rows)


def test_with_the_clock_text_each_batch_holds_texts(workshop: Workshop, tmp_path: Path) -> None:
    job = prepared(workshop, tmp_path, "embed", "8", TEXT)
    batches = worker.read_batches(job, job.cells[0])
    assert {len(b.items) for b in batches} == {8}
    assert all(text for b in batches for text in b.items)
    assert not batches[0].feeds


def test_the_datas_own_entities_are_kept_as_spans_of_the_texts(workshop: Workshop, tmp_path: Path) -> None:
    job = prepared(workshop, tmp_path, "token-classification", "8", TEXT)
    texts = json.loads((tmp_path / "inputs" / "8.json").read_text())
    gold = json.loads((tmp_path / "inputs" / "8.gold.json").read_text())
    assert len(gold) == len(texts)
    assert any(gold)
    names = {label[2:] for label in job.labels if "-" in label}
    for text, spans in zip(texts, gold, strict=True):
        for begin, end, name in spans:
            assert name in names
            assert text[begin:end] == text[begin:end].strip() != ""
            assert begin == 0 or text[begin - 1] == " "


def test_images_come_as_pixels_and_as_files(pair: Workshop, tmp_path: Path) -> None:
    found = subject.of(pair.bundle, tmp_path)
    for clock in (MODEL, TEXT):
        folder = tmp_path / clock
        folder.mkdir()
        job = replace(found.job, task="image", clock=clock, cells=(Cell(2),), work=str(folder))
        job, told, _ = subject.with_inputs(found, job, folder, allow_phi=False)
        assert told == "24 items of held-out"
        batch = worker.read_batches(job, Cell(2))[0]
        if clock == MODEL:
            assert batch.feeds["pixel_values"].shape[:2] == (2, 3)
            assert batch.feeds["pixel_values"].dtype == np.float32
        else:
            assert all(Path(item).is_file() for item in batch.items)


def test_inputs_that_are_made_up_say_so(pair: Workshop, tmp_path: Path) -> None:
    found = replace(subject.of(pair.bundle, tmp_path), data=None)
    for task, cell, said in (("text", Cell(1, 8), "random tokens"), ("image", Cell(1), "random pixels")):
        folder = tmp_path / task
        folder.mkdir()
        job = replace(found.job, task=task, cells=(cell,), work=str(folder))
        assert subject.with_inputs(found, job, folder, allow_phi=False)[1] == said


def test_a_bundle_names_its_checkpoint_only_while_it_is_the_one_that_was_compiled(
    small: Workshop, tmp_path: Path
) -> None:
    copy = small.copy(tmp_path / "copy")
    assert subject.of(copy.bundle, tmp_path).job.source == str((copy.root / "model").resolve())
    (copy.root / "model" / "config.json").write_text(
        json.dumps(json.loads((copy.root / "model" / "config.json").read_text()) | {"pad_token_id": 0, "new": 1})
    )
    found = subject.of(copy.bundle, tmp_path)
    assert found.job.source == ""
    assert "other files than those that were compiled" in found.notes[0]


def test_a_recipe_that_is_not_built_gives_contenders_of_its_checkpoint_and_says_so(
    small: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = subject.of(small.recipe, tmp_path)
    assert (found.job.bundle, found.job.source) == ("", str((small.root / "model").resolve()))
    assert "medcompile build" in found.notes[0]
    job = replace(found.job, task="embed", cells=(Cell(1, 8),), work=str(tmp_path))
    job, _, _ = subject.with_inputs(found, job, tmp_path, allow_phi=False)
    assert worker.read_batches(job, Cell(1, 8))[0].feeds["input_ids"].shape == (1, 8)


@pytest.mark.parametrize(
    ("said", "task", "clock", "expected"),
    [
        ("1x128,8x128,1x128", "embed", MODEL, (Cell(1, 128), Cell(8, 128))),
        ("1x128+64", "generate", MODEL, (Cell(1, 128, 64),)),
        ("1,8", "image", MODEL, (Cell(1), Cell(8))),
        ("32", "embed", TEXT, (Cell(32),)),
        ("", "embed", MODEL, (Cell(1, 128), Cell(8, 128), Cell(1, 512))),
        ("", "embed", TEXT, (Cell(1), Cell(32))),
        ("", "generate", MODEL, (Cell(1, 128, 64), Cell(8, 128, 64))),
    ],
)
def test_shapes_read_as_written(said: str, task: str, clock: str, expected: tuple[Cell, ...]) -> None:
    assert subject.cells(said, task, clock, 512) == expected


@pytest.mark.parametrize(
    ("said", "task", "clock"),
    [
        ("1x", "embed", MODEL),
        ("8", "embed", MODEL),
        ("1x128", "generate", MODEL),
        ("1x8", "image", MODEL),
        ("1x513", "embed", MODEL),
        ("0x8", "embed", MODEL),
        ("1x128", "embed", TEXT),
        ("", "generate", TEXT),
    ],
)
def test_shapes_that_mean_nothing_for_the_task_are_refused(said: str, task: str, clock: str) -> None:
    with pytest.raises(UsageError):
        subject.cells(said, task, clock, 512)


def test_usual_shapes_above_the_models_window_are_left_out() -> None:
    assert subject.cells("", "embed", MODEL, 256) == (Cell(1, 128), Cell(8, 128))
