"""Flips, harmful flips and costs: what changed, whom it harms, and what it costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medcompile.errors import DataError, UsageError
from medcompile.metrics import Predictions, evaluate, flips
from medcompile.spec import Evidence, Margin, Verdict

LABELS = ("healthy", "ill", "unclear")
TAGS = ("O", "B-Disease", "I-Disease")


def judged(task: str, margins: list[Margin], *rest: Any) -> dict[str, Evidence]:
    return {e.metric: e for e in evaluate(task, margins, *rest)}


def classes() -> tuple[Predictions, Predictions, np.ndarray]:
    """1000 items; 6 flips that harm, 3 that heal, 1 from wrong to wrong."""
    gold = np.arange(1_000) % 3
    reference = gold.copy()
    reference[900:] = (gold[900:] + 1) % 3
    candidate = reference.copy()
    candidate[:6] = (gold[:6] + 1) % 3
    candidate[900:903] = gold[900:903]
    candidate[999] = (gold[999] + 2) % 3
    return Predictions(reference), Predictions(candidate), gold


def test_flips_are_the_complement_of_agreement_and_harmful_ones_a_part_of_them() -> None:
    margins = [Margin("flips", 0.02), Margin("harmful_flips", 0.02)]
    found = judged("sequence-classification", margins, *classes())
    assert found["flips"].value == pytest.approx(1 - found["agreement"].value)
    assert found["flips"].value == pytest.approx(0.010)
    assert found["harmful_flips"].value == pytest.approx(0.006)
    assert found["harmful_flips"].discordant == 6
    for e in (found["flips"], found["harmful_flips"]):
        assert (e.reference, e.difference) == (0.0, pytest.approx(-e.value))
        assert e.lower < e.difference
        assert e.interval[1] <= 0.0
        assert e.verdict is Verdict.NON_INFERIOR


def test_the_bound_of_harmful_flips_is_the_exact_one_of_a_share() -> None:
    e = judged("sequence-classification", [Margin("harmful_flips", 0.02)], *classes())["harmful_flips"]
    assert -e.lower == pytest.approx(0.01180, abs=2e-5)  # Clopper and Pearson's upper 95 % bound of 6 in 1000


def test_more_harmful_flips_than_tolerated_are_inferior_though_as_many_heal() -> None:
    gold = np.arange(1_000) % 3
    reference, candidate = gold.copy(), gold.copy()
    reference[:60] = (gold[:60] + 1) % 3
    candidate[-60:] = (gold[-60:] + 1) % 3
    margins = [Margin("accuracy", 0.03), Margin("harmful_flips", 0.03)]
    found = judged("sequence-classification", margins, Predictions(reference), Predictions(candidate), gold)
    assert found["accuracy"].difference == 0.0
    assert found["harmful_flips"].verdict is Verdict.INFERIOR


def words(*sentences: str) -> list[np.ndarray]:
    return [np.array(["OBI".index(tag) for tag in sentence]) for sentence in sentences]


GOLD = words("BIOO", "OBOB", "OOOO", "BOOO", "OOBI")
BEFORE = Predictions(words("BIOO", "OBOO", "OOOO", "OOOO", "OOBI"))
AFTER = Predictions(words("BOOO", "OBOB", "OOBO", "OOBO", "OOBI"))


def test_flips_of_words_and_harmful_flips_of_entities() -> None:
    found = judged("token-classification", [Margin("flips", 0.9)], BEFORE, AFTER, GOLD, None, TAGS)
    assert found["flips"].value == pytest.approx(4 / 20)
    assert found["harmful_flips"].value == pytest.approx(1 / 5)
    assert (found["harmful_flips"].samples, found["harmful_flips"].units) == (5, 4)


def test_the_flipped_items_and_their_kinds() -> None:
    assert flips("sequence-classification", *classes()) == [
        *((i, "harmful") for i in range(6)),
        *((i, "healed") for i in range(900, 903)),
        (999, "other"),
    ]
    found = flips("token-classification", BEFORE, AFTER, GOLD, TAGS)
    assert found == [(0, "harmful"), (1, "healed"), (2, "other"), (3, "other")]
    assert {kind for _, kind in flips("token-classification", BEFORE, AFTER, None, TAGS)} == {"other"}
    one, other = (Predictions(np.ones((3, 2)), scores=np.eye(3)[chosen]) for chosen in ([0, 1, 2], [0, 2, 1]))
    assert flips("image", one, other, np.array([0, 1, 1])) == [(1, "harmful"), (2, "healed")]
    assert flips("embed", Predictions(np.ones((4, 2))), Predictions(np.zeros((4, 2)))) is None
    assert flips("image", Predictions(np.ones((4, 2))), Predictions(np.zeros((4, 2)))) is None


# ---- cost


def test_the_cost_of_classes_counts_each_mistake_by_what_it_costs() -> None:
    gold = np.array([1] * 300 + [0] * 300)
    reference, candidate = gold.copy(), gold.copy()
    reference[:3] = 0  # ill called healthy: 10 each
    candidate[:4] = 0
    candidate[300:302] = 1  # healthy called ill: 0.5 each
    candidate[302] = 2  # not named: 1
    costs = {"ill": {"healthy": 10.0}, "healthy": {"ill": 0.5}}
    margin = Margin("cost", 0.5, costs=costs)
    e = judged("sequence-classification", [margin], Predictions(reference), Predictions(candidate), gold, None, LABELS)
    assert e["cost"].reference == pytest.approx(30 / 600)
    assert e["cost"].value == pytest.approx((40 + 1 + 1) / 600)
    assert e["cost"].difference == pytest.approx(-12 / 600)
    assert e["cost"].lower < e["cost"].difference
    assert e["cost"].verdict is Verdict.NON_INFERIOR
    assert e["cost"].discordant == 4


def test_the_bound_of_a_cost_allows_for_dear_mistakes_not_seen_yet() -> None:
    gold = np.arange(500) % 2
    same = Predictions(gold)
    dear, cheap = (
        judged("sequence-classification", [Margin("cost", 1.0, costs=costs)], same, same, gold, None, LABELS)["cost"]
        for costs in ({"ill": {"healthy": 10.0}}, {"ill": {"healthy": 1.0}})
    )
    assert cheap.lower == pytest.approx(-3 / 500, rel=0.01)
    assert dear.lower == pytest.approx(-30 / 500, rel=0.01)


def test_the_cost_of_entities_is_per_entity_in_the_gold_labels() -> None:
    margin = Margin("cost", 5.0, costs={"missed": 10.0, "false_alarm": 1.0})
    e = judged("token-classification", [margin], BEFORE, AFTER, GOLD, None, TAGS)["cost"]
    assert e.reference == pytest.approx((10 * 2 + 0) / 5)
    assert e.value == pytest.approx((10 * 2 + 3) / 5)
    assert e.difference == pytest.approx(-3 / 5)


@pytest.mark.parametrize(
    ("task", "costs", "told"),
    [
        ("token-classification", {"missed": 1.0, "late": 2.0}, "late"),
        ("token-classification", {"missed": {"ill": 1.0}}, "missed"),
        ("sequence-classification", {"ill": {"dead": 1.0}}, "dead"),
        ("sequence-classification", {"sick": {"healthy": 1.0}}, "sick"),
        ("sequence-classification", {"ill": {"ill": 1.0}}, "costs nothing"),
        ("sequence-classification", {"ill": 3.0}, "ill"),
    ],
)
def test_costs_that_no_such_task_has_are_told(task: str, costs: dict[str, Any], told: str) -> None:
    answers = (BEFORE, AFTER, GOLD, None, TAGS) if task.startswith("token") else (*classes(), None, LABELS)
    with pytest.raises(UsageError, match=told) as caught:
        evaluate(task, [Margin("cost", 0.1, costs=costs)], *answers)
    assert caught.value.fix


def test_without_a_single_entity_there_is_nothing_to_miss() -> None:
    none = Predictions(words("OOOO", "OO"))
    for metric in ("cost", "harmful_flips"):
        with pytest.raises(DataError, match="no entity"):
            evaluate("token-classification", [Margin(metric, 0.1)], none, none, none.values, None, TAGS)


def test_cost_and_flips_are_told_only_where_a_margin_asks() -> None:
    found = judged("sequence-classification", [], *classes())
    assert "harmful_flips" in found
    assert not {"cost", "flips"} & set(found)
