"""Answers held against the reference's: what counts as the same, and what is called wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medcompile.bench import accuracy, worker
from medcompile.bench.accuracy import Answers
from medcompile.bench.peer import Answer
from medcompile.bench.results import Accuracy


def of(*arrays: Any) -> Answers:
    return Answers({k: np.asarray(a, np.float32) for k, a in enumerate(arrays)}, {})


def test_vectors_are_compared_by_cosine_whatever_their_length() -> None:
    found = accuracy.judge("embed", of([[2.0, 0.0], [0.0, 3.0]]), of([[1.0, 0.0], [0.3, 0.9]]))
    assert found.cosine_mean == pytest.approx((1 + 0.9 / np.sqrt(0.9)) / 2)
    assert found.cosine_worst == pytest.approx(0.9 / np.sqrt(0.9))
    assert (found.items, found.wrong) == (2, "")


def test_a_single_bad_vector_makes_the_answers_wrong() -> None:
    good = np.ones((50, 4))
    bad = good.copy()
    bad[7] = [1, -1, 1, 1]
    found = accuracy.judge("embed", of(bad), of(good))
    assert found.cosine_mean is not None and found.cosine_mean > 0.98
    assert found.wrong == "worst cosine below 0.9"


def test_labels_agree_by_their_largest_logit_at_every_token() -> None:
    reference = np.zeros((1, 20, 3))
    reference[..., 1] = 1
    other = reference.copy()
    other[0, 3] = [2, 0, 0]
    found = accuracy.judge("token-classification", of(other * 5), of(reference))
    assert (found.agreement, found.wrong) == (pytest.approx(0.95), "")


def test_generated_tokens_count_up_to_the_first_that_differs() -> None:
    reference = [[1, 2, 3, 4], [1, 2, 3, 4]]
    found = accuracy.judge("generate", of([[1, 2, 9, 4], [1, 2, 3, 4]]), of(reference))
    assert found.agreement == pytest.approx((0.5 + 1.0) / 2)
    assert found.wrong == ""
    other = accuracy.judge("generate", of([[9, 2, 3, 4], [9, 2, 3, 4], [1, 2, 3, 4]]), of([*reference, reference[0]]))
    assert other.wrong == "less than 0.5 begin with the same token"


def test_spans_are_compared_as_sets_of_each_item() -> None:
    same = [[(0, 3, "Disease")], [], [(5, 9, "Disease"), (12, 14, "Drug")]]
    other = [[(0, 3, "Disease")], [(1, 2, "Drug")], [(5, 9, "Disease"), (12, 14, "Drug")]]
    assert accuracy.judge("token-classification", Answers({}, {0: same}), Answers({}, {0: same})).agreement == 1.0
    found = accuracy.judge("token-classification", Answers({}, {0: other}), Answers({}, {0: same}))
    assert found.agreement == pytest.approx(6 / 7)


def test_the_datas_own_labels_are_a_metric_beside_the_agreement() -> None:
    spans = Answers({}, {1: [[(0, 3, "Disease")], [(4, 6, "Drug")]]})
    gold = [[], [], [[0, 3, "Disease"]], [[4, 7, "Drug"]]]
    found = accuracy.with_gold(Accuracy(2), spans, gold, batch=2)
    assert (found.gold, found.gold_metric) == (pytest.approx(0.5), "F1")
    classes = accuracy.with_gold(Accuracy(2), of([[0.1, 0.9], [0.8, 0.2]]), [1, 1], batch=2)
    assert (classes.gold, classes.gold_metric) == (0.5, "accuracy")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (of([[np.nan, 1.0]]), "NaN"),
        (of([[np.inf, 1.0]]), "infinite"),
        (of([[1.0]]), "shape"),
        (Answers({}, {}), "nothing was answered"),
    ],
)
def test_answers_that_cannot_be_compared_are_wrong_and_say_why(own: Answers, said: str) -> None:
    assert said in accuracy.judge("embed", own, of([[1.0, 0.0]])).wrong


def test_only_batches_that_both_answered_are_compared() -> None:
    found = accuracy.judge("embed", Answers({1: np.ones((2, 3))}, {}), of(-np.ones((2, 3)), np.ones((2, 3))))
    assert (found.items, found.cosine_worst) == (2, pytest.approx(1.0))


def test_answers_come_through_their_file_as_they_were(tmp_path: Path) -> None:
    spans = (((0, 4, "Disease"),), ())
    worker.write_answers(tmp_path / "a.npz", {0: Answer(np.arange(6.0).reshape(2, 3)), 3: Answer(spans=spans)})
    found = accuracy.read(tmp_path / "a.npz")
    assert found.values[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.spans == {3: [[(0, 4, "Disease")], []]}
