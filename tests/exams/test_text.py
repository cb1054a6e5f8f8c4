"""The exams of text encoders: what is asked, and that it is the same every time."""

from __future__ import annotations

from medcompile import bundle, verify
from medcompile.exams.text import TextExam, questions
from medcompile.runtime.text import TextAssets
from tests.tiny import Workshop


def test_fill_mask_hides_the_same_word_every_time(workshop: Workshop) -> None:
    built = bundle.read(workshop.bundle)
    items = verify.evaluation(built, workshop.root / "calibration/held-out.yaml").items
    text = TextAssets.read(built.root / "assets")
    asked, again = questions("fill-mask", items, text), questions("fill-mask", items[::-1], text)
    assert [q.text for q in asked] == [q.text for q in again[::-1]]
    assert all(q.text.split().count("[MASK]") == 1 and q.gold > 0 for q in asked)


def test_feeds_hold_every_item_once_at_the_shapes_of_the_graph(workshop: Workshop) -> None:
    built = bundle.read(workshop.bundle)
    found = verify.evaluation(built, workshop.root / "calibration/held-out.yaml")
    from medcompile import exams

    exam = exams.of("token-classification", verify.setting(built, found))
    assert isinstance(exam, TextExam)
    fed = list(exam.feeds(8))
    assert sum(f["input_ids"].shape[0] for f in fed) == len(exam.asked)
    assert all(set(f) == {t.name for t in exam.spec.inputs} for f in fed)
