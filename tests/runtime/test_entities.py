from __future__ import annotations

import numpy as np
import pytest

from medcompile.runtime.entities import LabelScheme
from medcompile.runtime.text import Tokens

TEXT = "aa bb cc dd ee"


def found(labels: list[str], tags: str, words: list[int] | None = None) -> list[tuple[str, str]]:
    """(label, text) of the entities when each two-letter token of TEXT gets the tag of that position."""
    ids = [labels.index(tag) for tag in tags.split()]
    tokens = Tokens(
        np.zeros(len(ids), np.int64),
        np.array([[3 * i, 3 * i + 2] for i in range(len(ids))]),
        np.array(words or range(len(ids))),
    )
    return [(e.label, e.text) for e in LabelScheme(labels).entities(TEXT, tokens, np.eye(len(labels))[ids])]


BIO = ["O", "B-x", "I-x", "B-y", "I-y"]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O O O O", []),
        ("B-x I-x O B-x O", [("x", "aa bb"), ("x", "dd")]),
        ("B-x B-x I-x O O", [("x", "aa"), ("x", "bb cc")]),
        ("O I-x I-x O I-x", [("x", "bb cc"), ("x", "ee")]),  # IOB1, or a model that forgot its B
        ("B-x I-y I-y O O", [("x", "aa"), ("y", "bb cc")]),
        ("O O O B-x I-x", [("x", "dd ee")]),
    ],
)
def test_bio_labels_make_entities(tags: str, expected: list[tuple[str, str]]) -> None:
    assert found(BIO, tags) == expected


def test_bioes_and_bilou_labels_make_entities() -> None:
    bioes = ["O", "B-x", "I-x", "E-x", "S-x"]
    assert found(bioes, "S-x S-x B-x I-x E-x") == [("x", "aa"), ("x", "bb"), ("x", "cc dd ee")]
    assert found(bioes, "B-x E-x I-x O E-x") == [("x", "aa bb"), ("x", "cc"), ("x", "ee")]
    assert found(["O", "B-x", "I-x", "L-x", "U-x"], "U-x B-x L-x O O") == [("x", "aa"), ("x", "bb cc")]


def test_plain_labels_join_neighbours_of_one_label_even_when_some_look_prefixed() -> None:
    assert found(["O", "DRUG", "DOSE"], "DRUG DRUG DOSE O DRUG") == [("DRUG", "aa bb"), ("DOSE", "cc"), ("DRUG", "ee")]
    assert found(["O", "B-cell", "T-cell"], "B-cell B-cell T-cell O O") == [("B-cell", "aa bb"), ("T-cell", "cc")]


def test_a_word_takes_its_first_tokens_label_and_ends_where_its_last_token_ends() -> None:
    assert found(BIO, "B-x O O I-x O", words=[0, 0, 0, 1, 2]) == [("x", "aa bb cc dd")]
    assert found(BIO, "O B-x I-x I-x I-x", words=[0, 0, 1, 1, 1]) == [("x", "cc dd ee")]


def test_the_score_is_the_mean_over_the_words_first_tokens() -> None:
    tokens = Tokens(np.zeros(3, np.int64), np.array([[0, 2], [3, 5], [6, 8]]), np.array([0, 0, 1]))
    probabilities = np.array([[0.1, 0.9, 0], [0.5, 0.4, 0.1], [0.3, 0, 0.7]])
    (entity,) = LabelScheme(["O", "B-x", "I-x"]).entities("aa bb cc", tokens, probabilities)
    assert (entity.start, entity.end) == (0, 8)
    assert entity.score == pytest.approx(0.8)


def test_without_an_outside_label_its_id_is_zero() -> None:
    assert LabelScheme(["DRUG", "DOSE"]).outside == 0
    assert LabelScheme(["DRUG", "O"]).outside == 1
