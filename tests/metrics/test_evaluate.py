"""The public face: predictions in, evidence out."""

from __future__ import annotations

import numpy as np
import pytest

from medcompile.errors import DataError, UsageError
from medcompile.metrics import Predictions, evaluate, is_metric, metric_names
from medcompile.spec import Evidence, Margin, Verdict

LABELS = ("O", "B-Disease", "I-Disease")


def by_name(evidence: tuple[Evidence, ...]) -> dict[str, Evidence]:
    return {e.metric: e for e in evidence}


def classes(n: int, lost: int, gained: int = 0) -> tuple[Predictions, Predictions, np.ndarray]:
    """n items, 90 % right in the reference; the candidate loses the first ones and gains some of the last."""
    gold = np.arange(n) % 3
    reference = np.where(np.arange(n) < 0.9 * n, gold, (gold + 1) % 3)
    candidate = np.where(np.arange(n) < lost, (gold + 1) % 3, reference)
    candidate = np.where(np.arange(n) >= n - gained, gold, candidate)
    return Predictions(reference), Predictions(candidate), gold


def sentences(n: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.choice(3, size=12, p=[0.8, 0.15, 0.05]) for _ in range(n)]


def vectors(n: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(n, 32)).astype(np.float32)
    return reference, reference + noise * rng.normal(size=(n, 32)).astype(np.float32)


def test_accuracy_counts_losses_and_gains_and_judges_them() -> None:
    reference, candidate, gold = classes(2_000, lost=6, gained=4)
    found = by_name(evaluate("sequence-classification", [Margin("accuracy", 0.01)], reference, candidate, gold))
    accuracy = found["accuracy"]
    assert (accuracy.reference, accuracy.value) == (0.9, pytest.approx(0.899))
    assert accuracy.difference == pytest.approx(-0.001)
    assert (accuracy.discordant, accuracy.samples, accuracy.units, accuracy.unit) == (10, 2_000, 2_000, "item")
    assert accuracy.verdict is Verdict.NON_INFERIOR
    assert accuracy.interval[0] < accuracy.lower < accuracy.difference < accuracy.interval[1]
    assert accuracy.graph == "sequence-classification"
    assert found["agreement"].value == pytest.approx(0.995)
    assert found["agreement"].verdict is found["agreement"].margin is found["agreement"].power is None
    assert found["agreement"].interval[1] <= 0.0


def test_a_large_loss_is_inferior_and_a_small_set_is_inconclusive() -> None:
    reference, candidate, gold = classes(2_000, lost=100)
    assert evaluate("sequence-classification", [Margin("accuracy", 0.01)], reference, candidate, gold)[0].verdict is (
        Verdict.INFERIOR
    )
    reference, candidate, gold = classes(150, lost=1)
    first = evaluate("sequence-classification", [Margin("accuracy", 0.01)], reference, candidate, gold)[0]
    assert first.verdict is Verdict.INCONCLUSIVE
    assert first.power is not None
    assert first.power < 0.5
    assert first.samples_needed is not None
    assert first.samples_needed > 300


def test_no_flip_at_all_has_the_rule_of_three_as_its_bound() -> None:
    reference, _, gold = classes(500, lost=0)
    for margin, verdict in ((0.01, Verdict.NON_INFERIOR), (0.005, Verdict.INCONCLUSIVE)):
        first = evaluate("sequence-classification", [Margin("accuracy", margin)], reference, reference, gold)[0]
        assert first.lower == pytest.approx(-3 / 500, rel=0.01)
        assert first.verdict is verdict
        assert first.samples_needed == pytest.approx(3 / margin, rel=0.02)


def test_a_margin_below_one_event_is_inconclusive_and_says_so() -> None:
    reference, candidate, gold = classes(500, lost=0, gained=30)
    first = evaluate("sequence-classification", [Margin("accuracy", 0.001)], reference, candidate, gold)[0]
    assert first.lower > -0.001
    assert first.verdict is Verdict.INCONCLUSIVE
    assert "less than one event in 500" in first.note


def test_flips_that_share_documents_widen_the_interval() -> None:
    reference, candidate, gold = classes(1_000, lost=20)
    task, margins = "sequence-classification", [Margin("accuracy", 0.03)]
    alone = evaluate(task, margins, reference, candidate, gold)[0]
    clumped = evaluate(task, margins, reference, candidate, gold, [i // 10 for i in range(1_000)])[0]
    spread = evaluate(task, margins, reference, candidate, gold, [i % 100 for i in range(1_000)])[0]
    assert (clumped.unit, clumped.units) == ("document", 100)
    assert clumped.lower < 1.4 * alone.lower
    assert 1.3 * alone.lower < spread.lower <= alone.lower
    assert (alone.verdict, clumped.verdict) == (Verdict.NON_INFERIOR, Verdict.INCONCLUSIVE)


def test_items_without_a_document_stand_alone() -> None:
    reference, candidate, gold = classes(10, lost=2)
    found = evaluate("sequence-classification", (), reference, candidate, gold, ["a", "a", *[None] * 8])
    assert found[0].units == 9


def test_macro_f1_is_the_mean_over_the_classes_of_the_gold_labels() -> None:
    gold = np.array([0, 0, 0, 1, 1, 2] * 40)
    reference, candidate = gold.copy(), gold.copy()
    candidate[:12] = 3
    found = by_name(evaluate("sequence-classification", (), Predictions(reference), Predictions(candidate), gold))
    right = np.array([np.sum((candidate == k) & (gold == k)) for k in range(3)])
    expected = np.mean([2 * r / (np.sum(gold == k) + np.sum(candidate == k)) for k, r in enumerate(right)])
    assert found["macro_f1"].reference == 1.0
    assert found["macro_f1"].value == pytest.approx(expected)


def test_entity_f1_of_equal_predictions_has_a_bound_below_zero() -> None:
    gold, predicted = sentences(400), Predictions(sentences(400, seed=1))
    f1 = evaluate("token-classification", [Margin("f1", 0.01)], predicted, predicted, gold, None, LABELS)[0]
    assert f1.difference == 0.0
    assert -0.01 < f1.lower < 0.0 < f1.interval[1]
    assert f1.verdict is Verdict.NON_INFERIOR
    assert f1.discordant == 0


def test_entity_metrics_share_units_and_are_the_same_in_every_run() -> None:
    gold = sentences(300)
    rng = np.random.default_rng(5)
    noisy = [np.where(rng.random(12) < 0.05, 0, s) for s in gold]
    worse = [np.where(rng.random(12) < 0.5, 0, s) for s in noisy]
    documents = [i // 3 for i in range(300)]
    runs = [
        evaluate("token-classification", [Margin("f1", 0.05)], Predictions(noisy), Predictions(worse), gold, d, LABELS)
        for d in (documents, documents, None)
    ]
    assert runs[0] == runs[1]
    found = by_name(runs[0])
    assert set(found) == {"f1", "precision", "recall", "agreement", "harmful_flips"}
    assert (found["f1"].samples, found["f1"].units, found["agreement"].samples) == (300, 100, 3_600)
    assert "studentized" in runs[2][0].method
    assert found["f1"].lower < found["f1"].difference < found["f1"].interval[1]
    assert runs[2][0].unit == "sentence"
    assert runs[2][0].difference == runs[0][0].difference


def test_cosine_and_retrieval_of_query_passage_pairs() -> None:
    queries, noisy = vectors(200, 0.05)
    passages = queries + 0.5 * vectors(200, 0.0, seed=9)[0]
    distractors, _ = vectors(50, 0.0, seed=7)
    passages = np.concatenate([passages, distractors])
    candidate = Predictions(noisy, passages)
    margins = [Margin("cosine", 0.01), Margin("recall@3", 0.02)]
    found = by_name(evaluate("embed", margins, Predictions(queries, passages), candidate))
    assert list(found) == [
        "cosine", "recall@3", "recall@1", "recall@5", "nearest_neighbour_agreement", "cosine_worst",
    ]  # fmt: skip
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    other = noisy / np.linalg.norm(noisy, axis=1, keepdims=True)
    expected = ((unit * other).sum(axis=1).sum() + 250) / 450
    assert found["cosine"].value == pytest.approx(expected, abs=1e-6)
    assert found["cosine"].reference == 1.0
    assert (found["cosine"].samples, found["cosine"].units) == (450, 250)
    assert found["cosine_worst"].value == pytest.approx((unit * other).sum(axis=1).min(), abs=1e-6)
    ranked = (unit @ (passages / np.linalg.norm(passages, axis=1, keepdims=True)).T).argsort(axis=1)[:, ::-1]
    for k in (1, 3, 5):
        share = np.mean([i in ranked[i, :k] for i in range(200)])
        assert found[f"recall@{k}"].reference == pytest.approx(share)


def test_embeddings_that_collapse_find_nothing_and_resemble_nothing() -> None:
    queries, _ = vectors(60, 0.0)
    for broken in (np.zeros_like(queries), np.ones_like(queries), np.full_like(queries, np.nan)):
        found = by_name(
            evaluate("embed", [Margin("recall@1", 0.05)], Predictions(queries, queries), Predictions(broken, broken))
        )
        assert found["recall@1"].value == 0.0
        assert found["recall@1"].verdict is Verdict.INFERIOR
        assert found["cosine"].value < 0.2


def test_identical_embeddings_are_non_inferior_with_an_interval_of_rounding_width() -> None:
    values, _ = vectors(40, 0.0)
    found = by_name(evaluate("embed", [Margin("cosine", 0.001)], Predictions(values), Predictions(values)))
    assert found["cosine"].verdict is Verdict.NON_INFERIOR
    assert -1e-5 < found["cosine"].lower < 0.0
    assert found["nearest_neighbour_agreement"].value == 1.0
    assert "recall@1" not in found


def test_one_document_alone_proves_nothing() -> None:
    gold, predicted = sentences(40), Predictions(sentences(40, seed=1))
    margins = [Margin("f1", 0.5), Margin("agreement", 0.5)]
    evidence = evaluate("token-classification", margins, predicted, predicted, gold, ["note"] * 40, LABELS)
    assert [e.verdict for e in evidence[:2]] == [Verdict.INCONCLUSIVE] * 2


def test_fill_mask_reports_agreement_and_accuracy() -> None:
    reference, candidate, gold = classes(300, lost=3)
    found = by_name(evaluate("fill-mask", [Margin("top1_agreement", 0.05)], reference, candidate, gold))
    assert set(found) == {"top1_agreement", "accuracy", "harmful_flips"}
    assert found["top1_agreement"].value == pytest.approx(0.99)
    assert (found["top1_agreement"].reference, found["top1_agreement"].verdict) == (1.0, Verdict.NON_INFERIOR)


def test_metric_names_and_patterns() -> None:
    assert "recall@k" in metric_names("embed")
    assert is_metric("embed", "recall@10")
    for task, name in (("embed", "recall@k"), ("embed", "recall@0"), ("embed", "f1"), ("embed", "cosine[a]"),
                       ("no-task", "f1"), ("token-classification", "f1@3")):  # fmt: skip
        assert not is_metric(task, name)
    with pytest.raises(UsageError, match="no metrics are known"):
        metric_names("translate")


@pytest.mark.parametrize(
    ("task", "metric", "hint"),
    [
        ("token-classification", "f2", "did you mean f1"),
        ("embed", "recal@1", "did you mean recall@k"),
        ("embed", "cosine_wurst", "did you mean cosine_worst"),
    ],
)
def test_an_unknown_metric_names_the_nearest_one(task: str, metric: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        evaluate(task, [Margin(metric, 0.1)], Predictions(np.zeros(3)), Predictions(np.zeros(3)))
    assert hint in caught.value.fix


def test_a_metric_without_gold_is_left_out_unless_a_margin_asks_for_it() -> None:
    reference, candidate, _ = classes(100, lost=1)
    found = evaluate("sequence-classification", (), reference, candidate)
    assert [e.metric for e in found] == ["agreement"]
    with pytest.raises(DataError, match="needs gold labels") as caught:
        evaluate("sequence-classification", [Margin("accuracy", 0.1)], reference, candidate)
    assert "evaluation.data" in caught.value.fix
    values, _ = vectors(5, 0.0)
    with pytest.raises(DataError, match="query/passage"):
        evaluate("embed", [Margin("recall@1", 0.1)], Predictions(values), Predictions(values))


@pytest.mark.parametrize(
    ("reference", "candidate", "gold", "message"),
    [
        ([np.zeros(3, int)], [], None, "item counts differ"),
        ([np.zeros(3, int)], [np.zeros(2, int)], None, "item 0 has another number of words"),
        ([np.zeros(3, int)], [np.zeros(3, int)], [np.zeros(4, int)], "item 0 has another number of words"),
        ([np.zeros(3, int)], [np.array([0, 1, 7])], None, "candidate holds label id 7"),
        ([np.zeros(3, int)], [np.zeros(3, int)], [np.array([0, -1, 0])], "gold holds label id -1"),
        ([], [], None, "no evaluation items"),
        ([np.zeros(0, int)], [np.zeros(0, int)], None, "hold no words"),
    ],
)
def test_predictions_that_do_not_match_are_refused(reference: list, candidate: list, gold: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate("token-classification", (), Predictions(reference), Predictions(candidate), gold, None, LABELS)


def test_a_reference_with_nan_is_refused() -> None:
    values, _ = vectors(5, 0.0)
    broken = values.copy()
    broken[2, 3] = np.nan
    with pytest.raises(DataError, match="NaN"):
        evaluate("embed", (), Predictions(broken), Predictions(values))
