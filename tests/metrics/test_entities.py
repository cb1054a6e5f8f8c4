"""Entity counts against seqeval, the program whose rules they claim to follow."""

from __future__ import annotations

import numpy as np
import pytest
from seqeval.metrics import f1_score, precision_score, recall_score

from medcompile.metrics import Predictions, evaluate
from medcompile.metrics.entities import count_entities, entity_spans, entity_types

BIO = ["O", "B-Disease", "I-Disease", "B-Drug", "I-Drug"]
BIOES = [*BIO, "E-Disease", "S-Disease", "E-Drug", "S-Drug"]


def random_sentences(rng: np.random.Generator, labels: list[str], sentences: int) -> list[np.ndarray]:
    return [rng.integers(0, len(labels), rng.integers(0, 9)) for _ in range(sentences)]


def corrupted(rng: np.random.Generator, sentences: list[np.ndarray], labels: list[str], share: float) -> list:
    return [np.where(rng.random(len(s)) < share, rng.integers(0, len(labels), len(s)), s) for s in sentences]


@pytest.mark.parametrize("labels", [BIO, BIOES], ids=["BIO", "BIOES"])
def test_entity_scores_equal_seqeval_on_random_sequences(labels: list[str]) -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        gold = random_sentences(rng, labels, 30)
        reference, candidate = corrupted(rng, gold, labels, 0.2), corrupted(rng, gold, labels, 0.4)
        evidence = evaluate(
            "token-classification", (), Predictions(reference), Predictions(candidate), gold, None, labels
        )
        found = {e.metric: e for e in evidence}
        names = [[[labels[i] for i in s] for s in sentences] for sentences in (gold, reference, candidate)]
        for metric, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
            assert found[metric].reference == pytest.approx(score(names[0], names[1]), abs=1e-12)
            assert found[metric].value == pytest.approx(score(names[0], names[2]), abs=1e-12)


@pytest.mark.parametrize(
    ("words", "spans"),
    [
        (["I-Drug", "I-Drug", "O"], [(0, 1, "Drug")]),
        (["B-Drug", "I-Disease", "O"], [(0, 0, "Drug"), (1, 1, "Disease")]),
        (["B-Drug", "B-Drug", "I-Drug", "O"], [(0, 0, "Drug"), (1, 2, "Drug")]),
        (["O", "O"], []),
    ],
)
def test_an_inside_tag_without_a_begin_or_of_another_type_opens_an_entity(words: list[str], spans: list) -> None:
    tags, types, names = entity_types(BIO)
    first, last, kind = entity_spans(np.array([BIO.index(w) for w in words]), tags, types)
    assert [(int(f), int(e), names[k]) for f, e, k in zip(first, last, kind, strict=True)] == spans


def test_labels_without_prefix_make_one_entity_of_equal_neighbours() -> None:
    labels = ["O", "PATIENT", "ORG"]
    counts = count_entities([np.array([1, 1, 2, 0, 2])], [np.array([1, 1, 2, 0, 0])], np.array([0]), labels)
    assert counts.gold.sum() == 3
    assert counts.right.sum() == counts.predicted.sum() == 2


def test_counts_are_kept_by_unit_and_type() -> None:
    gold = [np.array([1, 2, 0]), np.array([3]), np.array([0, 3])]
    predicted = [np.array([1, 2, 0]), np.array([3]), np.array([3, 0])]
    counts = count_entities(gold, predicted, np.array([0, 1, 1]), BIO)
    assert counts.gold.tolist() == [[1, 0], [0, 2]]
    assert counts.predicted.tolist() == [[1, 0], [0, 2]]
    assert counts.right.tolist() == [[1, 0], [0, 1]]
