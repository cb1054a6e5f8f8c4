"""flips.json: items by name, harmful ones first, and no more than can be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from medcompile import bundle, exams, flips, verify
from medcompile.data import Item
from medcompile.exams import key_of
from medcompile.exams.text import Question, TextExam
from medcompile.metrics import Predictions
from medcompile.spec import GraphSpec
from tests.tiny import Workshop

TASK = "sequence-classification"


class Asked(TextExam):
    """An exam that is never run."""


def exam(*items: Item) -> TextExam:
    asked = tuple(Question(item, item.text) for item in items)
    return Asked(GraphSpec(TASK, (), (), ()), None, ("no", "yes"), asked)  # type: ignore[arg-type]


def item(n: int, **more: str) -> Item:
    return Item(f"{n:064x}"[::-1], f"a patient's words {n}", label="yes", **more)


def test_items_are_named_by_id_or_digest_and_never_by_text() -> None:
    asked = exam(item(1, id="case-1"), item(2), item(3))
    found = exams.flips(asked, Predictions(np.array([1, 0, 1])), Predictions(np.array([0, 1, 1])))
    assert found == (("case-1", "harmful"), ("200000000000", "healed"))
    embeddings = Predictions(np.zeros((3, 2)))
    assert exams.flips(replace(asked, spec=GraphSpec("embed", (), (), ())), embeddings, embeddings) is None


def test_harmful_flips_are_kept_first_and_the_rest_is_cut() -> None:
    many = [(f"item {n}", ("healed", "other", "harmful")[n % 3]) for n in range(3 * flips.MOST)]
    kept = flips.ranked(many)
    assert len(kept) == flips.MOST
    assert kept == tuple(flip for flip in many if flip[1] == "harmful")
    assert [kind for _, kind in flips.ranked(many[:6])] == ["harmful", "harmful", "other", "other", "healed", "healed"]


def test_what_is_new_joins_what_the_bundle_has_of_artifacts_that_stay(tmp_path: Path) -> None:
    flips.write(tmp_path / flips.FILE, {"a": [("1", "other")], "b": [("2", "healed")], "gone": []})
    with flips.renewed(tmp_path, {"b": [("3", "harmful")], "c": []}, ["a", "b", "c"]) as files:
        told = json.loads(files[flips.FILE].read_text())
    assert told == {"a": [["1", "other"]], "b": [["3", "harmful"]], "c": []}
    with flips.renewed(tmp_path / "elsewhere", {}, ["a"]) as files:
        assert files == {}


def test_items_without_a_group_are_one_of_their_own() -> None:
    items = [replace(item(1), groups=(("site", "north"),)), replace(item(2), groups=(("site", ""),)), item(3)]
    key = key_of(None, items, ())
    assert key.groups == {"site": ["north", "(none)", "(none)"]}


def test_confidences_come_back_with_the_reference_and_older_ones_without(tmp_path: Path) -> None:
    asked = exam(item(1), item(2))
    sentences = [np.array([0, 1, 0]), np.array([1])]
    sure = [np.array([0.5, 0.75, 1.0], np.float32), np.array([0.25], np.float32)]
    verify.write_reference(tmp_path / "r.npz", asked, Predictions(sentences, confidences=sure))
    found = verify.read_reference(tmp_path / "r.npz", asked)
    assert found.confidences is not None
    assert [c.tolist() for c in found.confidences] == [[0.5, 0.75, 1.0], [0.25]]
    assert [v.tolist() for v in found.values] == [[0, 1, 0], [1]]
    verify.write_reference(tmp_path / "old.npz", asked, Predictions(sentences))
    assert verify.read_reference(tmp_path / "old.npz", asked).confidences is None
    flat = Predictions(np.array([0, 1]), confidences=np.array([0.5, 0.75], np.float32))
    verify.write_reference(tmp_path / "flat.npz", asked, flat)
    again = verify.read_reference(tmp_path / "flat.npz", asked)
    assert isinstance(again.confidences, np.ndarray)
    assert again.confidences.tolist() == [0.5, 0.75]


def test_a_bundle_lists_the_items_of_every_graph_that_decides(workshop: Workshop) -> None:
    built = bundle.read(workshop.bundle)
    listed = json.loads((built.root / flips.FILE).read_text(encoding="utf-8"))
    deciding = [a for a in built.artifacts if a.graph != "embed"]
    assert sorted(listed) == sorted(a.path for a in deciding)
    for artifact in deciding:
        told = next(e for e in artifact.evidence if e.metric in ("agreement", "top1_agreement"))
        assert bool(listed[artifact.path]) == (told.value < 1.0)
        assert all(len(name) <= 12 and kind in ("harmful", "healed", "other") for name, kind in listed[artifact.path])
