"""A metric in every group of a column, and the worst of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medcompile.errors import UsageError
from medcompile.metrics import Predictions, evaluate, is_metric, metric_names
from medcompile.spec import Evidence, Margin, Verdict

LABELS = ("a", "b", "c")
TAGS = ("O", "B-Disease", "I-Disease")


def classes(n: int = 2_000) -> tuple[Predictions, np.ndarray, dict[str, list[str]]]:
    """Sites north (60 %), south (30 %) and west; every other item is of one sex."""
    gold = np.arange(n) % 3
    site = np.repeat(["north", "south", "west"], [6 * n // 10, 3 * n // 10, n // 10])
    return Predictions(gold), gold, {"site": site.tolist(), "sex": ["f", "m"] * (n // 2)}


def losing(gold: np.ndarray, where: slice) -> Predictions:
    candidate = gold.copy()
    candidate[where] = (gold[where] + 1) % 3
    return Predictions(candidate)


def found(margins: list[Margin], candidate: Predictions, *, n: int = 2_000, **more: Any) -> dict[str, Evidence]:
    reference, gold, groups = classes(n)
    told = evaluate("sequence-classification", margins, reference, candidate, gold, more.get("units"), LABELS, groups)
    return {e.metric: e for e in told}


def test_one_bad_group_makes_the_whole_inferior_though_the_mean_is_not() -> None:
    _, gold, _ = classes()
    margins = [Margin("accuracy", 0.05), Margin("accuracy[worst:site]", 0.05)]
    seen = found(margins, losing(gold, slice(1_800, 1_840)))  # 20 % of the west
    assert seen["accuracy"].verdict is Verdict.NON_INFERIOR
    worst = seen["accuracy[worst:site]"]
    assert worst.verdict is Verdict.INFERIOR
    assert worst.value == pytest.approx(0.8)
    assert worst.samples == 200
    assert "west" in worst.note
    assert "of 3 groups by site" in worst.note


def test_the_worst_group_is_the_one_of_the_lowest_bound_and_all_must_hold() -> None:
    _, gold, _ = classes()
    (seen,) = (found([Margin("accuracy[worst:site]", m)], Predictions(gold)) for m in (0.02,))
    worst = seen["accuracy[worst:site]"]
    assert worst.difference == 0.0
    assert (worst.samples, worst.verdict) == (200, Verdict.NON_INFERIOR)
    assert worst.lower == pytest.approx(-3 / 200, rel=0.01)
    assert "west" in worst.note
    tight = found([Margin("accuracy[worst:site]", 0.01)], Predictions(gold))["accuracy[worst:site]"]
    assert tight.verdict is Verdict.INCONCLUSIVE


def test_the_p_value_of_the_worst_group_is_the_largest_of_all_groups() -> None:
    _, gold, _ = classes()
    candidate = losing(gold, slice(0, 12))
    together = found([Margin("accuracy[worst:site]", 0.03)], candidate)["accuracy[worst:site]"]
    assert together.p_value is not None
    alone = []
    for part in (slice(0, 1_200), slice(1_200, 1_800), slice(1_800, 2_000)):
        arrays = Predictions(gold[part]), Predictions(np.asarray(candidate.values)[part]), gold[part]
        alone.append(evaluate("sequence-classification", [Margin("accuracy", 0.03)], *arrays)[0].p_value)
    assert together.p_value == pytest.approx(max(p for p in alone if p is not None))


def test_a_group_too_small_to_judge_is_said_and_keeps_the_verdict_open() -> None:
    reference, gold, groups = classes(1_000)
    groups["site"][-3:] = ["islands"] * 3
    margins = [Margin("accuracy[worst:site]", 0.05)]
    worst = evaluate("sequence-classification", margins, reference, reference, gold, None, LABELS, groups)[0]
    assert worst.verdict is Verdict.INCONCLUSIVE
    assert "too small to judge: islands (3)" in worst.note


def test_every_group_is_reported_beside_it_and_not_judged() -> None:
    _, gold, _ = classes()
    seen = found([], losing(gold, slice(1_800, 1_840)))
    assert seen["accuracy[site:west]"].value == pytest.approx(0.8)
    assert seen["accuracy[site:north]"].value == 1.0
    assert seen["macro_f1[sex:f]"].verdict is None
    assert seen["accuracy[sex:m]"].samples == 1_000


def test_more_groups_than_can_be_shown_are_judged_all_the_same() -> None:
    reference, gold, _ = classes(3_000)
    many = {"ward": [str(i % 20) for i in range(3_000)]}
    told = evaluate(
        "sequence-classification", [Margin("accuracy[worst:ward]", 0.1)], reference, reference, gold, None, LABELS, many
    )
    assert told[0].verdict is Verdict.NON_INFERIOR
    assert "of 20 groups" in told[0].note
    assert not any("ward:" in e.metric for e in told)


def test_documents_stay_together_inside_of_a_group() -> None:
    _, gold, _ = classes()
    units = [i // 10 for i in range(2_000)]
    worst = found([Margin("accuracy[worst:site]", 0.3)], Predictions(gold), units=units)["accuracy[worst:site]"]
    assert (worst.unit, worst.units) == ("document", 20)


def test_entities_and_costs_by_group() -> None:
    rng = np.random.default_rng(0)
    gold = [rng.choice(3, size=8, p=[0.7, 0.2, 0.1]) for _ in range(400)]
    worse = [np.where(i >= 300, 0, s) for i, s in enumerate(gold)]  # the second site finds nothing
    groups = {"site": ["one"] * 300 + ["two"] * 100}
    margins = [
        Margin("recall[worst:site]", 0.2),
        Margin("harmful_flips[worst:site]", 0.2),
        Margin("cost[worst:site]", 2.0, costs={"missed": 10.0}),
    ]
    told = evaluate("token-classification", margins, Predictions(gold), Predictions(worse), gold, None, TAGS, groups)
    seen = {e.metric: e for e in told}
    assert seen["recall[worst:site]"].value == 0.0
    assert seen["harmful_flips[worst:site]"].value == 1.0
    assert seen["cost[worst:site]"].value == pytest.approx(10.0)
    assert {seen[m.metric].verdict for m in margins} == {Verdict.INFERIOR}
    assert seen["f1[site:one]"].value == 1.0


def test_a_group_without_any_entity_is_said() -> None:
    gold = [np.array([1, 2, 0, 1])] * 200
    empty = [np.zeros(4, dtype=int)] * 20
    groups = {"site": ["one"] * 200 + ["two"] * 20}
    answers = Predictions([*gold, *empty])
    margins = [Margin("harmful_flips[worst:site]", 0.2)]
    told = evaluate("token-classification", margins, answers, answers, answers.values, None, TAGS, groups)[0]
    assert told.verdict is Verdict.INCONCLUSIVE
    assert "too small to judge: two (20)" in told.note


def test_images_by_group_use_their_scores() -> None:
    rng = np.random.default_rng(1)
    scores, gold = np.eye(3)[np.arange(300) % 3] * 0.8 + 0.1, np.arange(300) % 3
    wrong = scores.copy()
    wrong[200:] = np.roll(wrong[200:], 1, axis=1)
    pair = (Predictions(rng.normal(size=(300, 4)), scores=s) for s in (scores, wrong))
    groups = {"scanner": ["old"] * 200 + ["new"] * 100}
    told = evaluate("image", [Margin("accuracy[worst:scanner]", 0.1)], *pair, gold, None, LABELS, groups)
    assert told[0].value == 0.0
    assert "new" in told[0].note


def test_a_column_that_the_data_lack_is_told() -> None:
    reference, gold, groups = classes(100)
    with pytest.raises(UsageError, match=r"no groups 'age', only site, sex"):
        evaluate(
            "sequence-classification", [Margin("accuracy[worst:age]", 0.1)], reference, reference, gold, None, LABELS,
            groups,
        )  # fmt: skip


def test_only_metrics_of_a_part_of_the_items_can_be_asked_of_the_worst() -> None:
    assert is_metric("token-classification", "recall[worst:site]")
    assert is_metric("image", "auroc[worst:sex]")
    for task, name in (("embed", "recall@1[worst:site]"), ("image", "cosine[worst:site]"), ("fill-mask", "accuracy[]")):
        assert not is_metric(task, name)
    assert "f1[worst:group]" in metric_names("token-classification")
